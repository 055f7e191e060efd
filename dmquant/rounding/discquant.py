"""DiscQuant: each weight is learned between two values of its grid, and pulled to the nearer one all the while.

Chee et al., "DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory", arXiv 2501.06417,
sections 3 and 4, with the clamp of the data's gradient, and the projection, of its released code.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dmquant.grids import Grid
from dmquant.rounding.base import Box, Rounding

LEARNS = True
NEEDS_MOMENTS = False


class Options(BaseModel, extra="forbid"):
    """Options of DiscQuant in a recipe."""

    rho: float = Field(default=4.0, ge=0)
    """Weight of the error, which is 1 at nearest rounding, times the number of weights, against the linear term."""
    clamp: float = Field(default=1.0, gt=0)
    """The largest derivative of the weighted error; that of the linear term is at most 1."""
    start: Literal["weight", "random"] = "weight"
    """Where learning begins: at the weight, or as published at random between its two values."""
    warmup: float = Field(default=0.125, ge=0, lt=1)
    """Share of the steps in which the learning rate rises, before it falls to 0 along a cosine."""


class DiscQuant(Rounding):
    """W~ = (1 - x) lower + x upper, with x in [0, 1], and W~ = W at x = y; it minimises rho * error - <2 y - 1, x>.

    Without an error, that ends at nearest rounding, or at the solution that learning began with.
    """

    learning_rate = 0.05

    def __init__(self, grid: Grid, options: Options):
        super().__init__(grid)
        self.options = options
        lower, upper, fraction = Box.around(grid)
        fraction = torch.where(upper > lower, fraction, 0.5)  # with nowhere to go it is not pulled
        self.register_buffer("lower", lower.contiguous())
        self.register_buffer("upper", upper.contiguous())
        self.register_buffer("pull", 2 * fraction - 1)
        if options.start == "random":
            draw = torch.Generator().manual_seed(0)
            fraction = torch.rand(fraction.shape, generator=draw, dtype=torch.float32).to(fraction)
        self.x = nn.Parameter(fraction)

    def forward(self) -> Tensor:
        return torch.lerp(self.lower, self.upper, self.x)

    def add_penalty_gradient_(self, progress: float, share: float) -> None:
        """Make the gradient of the error, of which `share` is that of one weight, that of what is minimised."""
        if self.x.grad is None:
            self.x.grad = torch.zeros_like(self.x)
        clamp = self.options.clamp
        self.x.grad.mul_(self.options.rho / share).clamp_(-clamp, clamp).sub_(self.pull)

    def rate(self, progress: float) -> float:
        warmup = self.options.warmup
        if progress < warmup:
            return progress / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))

    @torch.no_grad()
    def project_(self) -> None:
        self.x.clamp_(0, 1)

    def hard(self) -> Tensor:
        begun = self.grid.nearest if self.grid.solution is None else self.grid.solution
        decided = torch.where(self.x > 0.5, self.upper, self.lower)
        return torch.where(self.x == 0.5, begun, decided)

    def undecided(self) -> int:
        return int(((self.x > 0) & (self.x < 1) & (self.upper > self.lower)).sum())


start = DiscQuant
"""Soft weights equal to the float weights (clipped to the grid), or to what a solution wanted; or at random."""
