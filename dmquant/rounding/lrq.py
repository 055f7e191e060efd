"""LRQ: FlexRound whose scales of the weights are a product of two narrow matrices, so that few numbers are learned.

Lee et al., "LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling
Matrices", arXiv 2407.11534, eq. 2.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from dmquant.rounding import flexround

LEARNS = True
NEEDS_MOMENTS = False


class Options(flexround.Options):
    """Options of LRQ in a recipe."""

    rank: int = Field(default=32, ge=1)
    """Width of the two matrices, at most the smaller side of the layer."""


class LRQ(flexround.FlexRound):
    """S2 = exp(-L U), L = 0 at the start."""

    learning_rate = 0.01

    def _start_factors(self, options: Options) -> None:
        rows, columns = self.grid.weight.shape
        rank = min(options.rank, rows, columns)
        generator = torch.Generator().manual_seed(0)  # the same start on every machine
        bound = 1 / math.sqrt(columns)  # of torch's own linear layers: Kaiming's with a = sqrt(5)
        right = torch.empty(rank, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.left = nn.Parameter(self.grid.weight.new_zeros(rows, rank))
        self.right = nn.Parameter(right.to(self.grid.weight))

    def of_each(self) -> Tensor:
        return self.left @ self.right


start = LRQ
"""Exactly nearest rounding, or exactly the solution."""
