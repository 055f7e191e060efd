"""AutoRound: learn an offset of half a step at most before rounding, and the scales, by the signs of gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516,
eq. 3 to 5, with the local step of a floating-point grid.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.grids import Grid
from dmquant.rounding.straight import Straight

LEARNS = True
NEEDS_MOMENTS = False
BOUND = 0.5  # of the offsets, in steps, and of the logarithms by which the scales move


class Options(BaseModel, extra="forbid"):
    """Options of AutoRound in a recipe."""

    learn_scales: bool = True
    """Learn the grid's scales too, where their store has scales near to one another."""


class SignDescent(torch.optim.Optimizer):
    """Each step moves every number by the rate against the sign of its gradient, at most BOUND from zero."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float):
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=group["lr"]).clamp_(-BOUND, BOUND)


class AutoRound(Straight):
    """W~ = Q(W + V step), with V from -0.5 to 0.5."""

    learning_rate = 1 / 200  # over that many steps of a falling rate, half a step of the grid

    def __init__(self, grid: Grid, options: Options):
        super().__init__(grid, options.learn_scales)
        self.register_buffer("step", grid.step)
        self.offset = nn.Parameter(torch.zeros_like(grid.weight))

    def rounded_from(self) -> Tensor:
        return torch.addcmul(self.source, self.offset, self.step)

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        return SignDescent(parameters, learning_rate)

    def rate(self, progress: float) -> float:
        return 1 - progress


start = AutoRound
"""Exactly nearest rounding, or exactly the solution."""
