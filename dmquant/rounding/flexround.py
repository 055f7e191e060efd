"""FlexRound: round after a division by learned scales, one of each weight, of each output and of each input channel.

Lee et al., "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization",
arXiv 2306.00317, eq. 2, with the logarithms that its released code learns.
"""

import math

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.grids import Grid
from dmquant.rounding.straight import Straight
from dmquant.scaling import to_matrix

LEARNS = True
NEEDS_MOMENTS = False


class Options(BaseModel, extra="forbid"):
    """Options of FlexRound in a recipe."""

    learn_scales: bool = True
    """Learn the grid's scales too, where their store has scales near to one another."""


class FlexRound(Straight):
    """W~ = s1 c(W / (s1 S2 s3 s4)), with c the format's nearest value; exp(-factor) is S2 s3 s4."""

    learning_rate = 0.003

    def __init__(self, grid: Grid, options: Options):
        super().__init__(grid, options.learn_scales)
        rows, channels = grid.shape[:2]
        self.of_output = nn.Parameter(grid.weight.new_zeros(rows, 1))
        self.of_input = nn.Parameter(grid.weight.new_zeros(1, channels, *(1 for _ in grid.shape[2:])))
        self._start_factors(options)

    def _start_factors(self, options: BaseModel) -> None:
        self.of_weight = nn.Parameter(torch.zeros_like(self.grid.weight))

    def of_each(self) -> Tensor:
        """The part of `factor` that is each weight's own, (rows, columns)."""
        return self.of_weight

    def factor(self) -> Tensor:
        """-log(S2 s3 s4), (rows, columns)."""
        shape = (1, *self.grid.shape[1:])
        of_columns = to_matrix(self.of_input.expand(shape), self.grid.spec.split)
        return self.of_each() + (self.of_output + of_columns)

    def rounded_from(self) -> Tensor:
        return self.source * self.factor().exp()

    def rate(self, progress: float) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * progress)


start = FlexRound
"""Exactly nearest rounding, or exactly the solution."""
