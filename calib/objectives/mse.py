"""The mean squared error of the unit's output: BRECQ, Li et al., arXiv 2102.05426, without its Fisher weights."""

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from dmquant.calib.objectives.base import Objective, UnitData, squared_error


class Options(BaseModel, extra="forbid"):
    """Options of the mean squared error in a recipe: none."""


class SquaredError(Objective):
    """`squared_error` of the unit's output and that of full precision."""

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return squared_error(self.data.run(batch, generator), self.data.target(batch))


def start(data: UnitData, options: Options) -> SquaredError:
    """The objective of one unit."""
    return SquaredError(data)
