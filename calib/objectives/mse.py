"""The mean squared error of the unit's output: BRECQ, Li et al., arXiv 2102.05426, without its Fisher weights."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from dmquant.calib.objectives.base import Objective, UnitData, sample_errors, squared_error

Rows = Literal["absolute", "relative"]


class Options(BaseModel, extra="forbid"):
    """Options of the mean squared error in a recipe."""

    rows: Rows = "absolute"
    """`relative`: the error of every row, of one guidance branch of a sample, over the mean square of its target."""


class SquaredError(Objective):
    """`squared_error` of the unit's output and that of full precision."""

    def __init__(self, data: UnitData, options: Options):
        super().__init__(data)
        self.is_relative = options.rows == "relative"

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self.of_output(self.data.run(batch, generator), batch)

    def of_output(self, output: Any, batch: Sequence[int]) -> Tensor:
        """The error of the unit's output for a batch of samples, a scalar."""
        target = self.data.target(batch)
        if self.is_relative:
            return sample_errors(output, target, len(batch), relative=True).mean()
        return squared_error(output, target)


start = SquaredError
"""The objective of one unit."""
