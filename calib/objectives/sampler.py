"""Errors weighted by how far one at their step of the schedule moves the final latents.

The weight of a step is what `dmquant.calib.data.importance` measures: how far the final latents move where the
prediction is disturbed by a small share of itself. So every row's error counts over the mean square of its target.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmquant.calib.objectives import mse
from dmquant.calib.objectives.base import IMPORTANCE, sample_errors


class Options(mse.Options):
    """Options of the weighted error in a recipe."""

    rows: mse.Rows = "relative"


def needs(options: Options) -> frozenset[str]:
    """What it needs beside the unit's outputs."""
    return frozenset({IMPORTANCE})


class Weighted(mse.SquaredError):
    """The mean over samples of their squared errors times the importance of their steps."""

    def of_output(self, output: Any, batch: Sequence[int]) -> Tensor:
        errors = sample_errors(output, self.data.target(batch), len(batch), self.is_relative)
        return (errors * self.data.importance(batch).to(errors)).mean()


start = Weighted
"""The objective of one unit."""
