"""The interface of every rounding while it is decided."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant.grids import Grid
from dmquant.qtensor import QuantizedTensor


class Rounded(NamedTuple):
    """Values (rows, columns), float32, and the grid that they lie on."""

    values: Tensor
    grid: Grid

    def quantized(self) -> QuantizedTensor:
        """The packed codes of the values, with the scales of their grid and the shape of its weight."""
        return QuantizedTensor.of(self.grid, self.values)


class Box(NamedTuple):
    """Two adjacent values for each weight, between which it is learned, and where it stands; (rows, columns) float32.

    The values are equal where a weight has nowhere to go.
    """

    lower: Tensor
    upper: Tensor
    fraction: Tensor
    """From 0, the lower value, to 1."""

    @classmethod
    def around(cls, grid: Grid) -> "Box":
        """The values around each weight, or around what a solution wanted, of which the solution is the nearer."""
        if grid.solution is None:
            return cls(*grid.neighbours, grid.fraction())
        side = torch.where(grid.wanted < grid.solution, -1.0, 1.0)
        beside = replace(grid, weight=grid.solution + 0.1 * side * grid.step, solution=None, wanted=None)
        lower, upper = beside.neighbours
        is_upper = (upper - grid.solution).abs() < (grid.solution - lower).abs()
        there = ((grid.wanted - lower) / (upper - lower).clamp(min=torch.finfo().tiny)).clamp(0, 1)
        fraction = torch.where(is_upper, there.clamp(min=0.5), there.clamp(max=0.4999))
        return cls(lower, upper, torch.where(upper > lower, fraction, 0.0))


class Rounding(nn.Module):
    """The rounding of one weight on a grid; its parameters are learned.

    `forward()` gives the weight to compute with while learning, (rows, columns) float32, differentiable.
    """

    learning_rate = 0.1
    """Where a recipe names none."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """What moves the parameters of all roundings of a unit."""
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)

    def rate(self, progress: float) -> float:
        """The learning rate over that of the recipe when `progress` (0 to 1) of the steps are done."""
        return 1.0

    def penalty(self, progress: float) -> Tensor | None:
        """A scalar to add to the loss, summed over the weights, when `progress` (0 to 1) of the steps are done."""
        return None

    def add_penalty_gradient_(self, progress: float, share: float) -> None:
        """Add the gradient of `share` times the penalty to those of the parameters."""
        penalty = self.penalty(progress)
        if penalty is not None:
            (share * penalty).backward()

    def project_(self) -> None:
        """Bring the parameters back to where they may be, after every step."""

    def hard(self) -> Tensor:
        """The decision as it stands: values of `decided_grid()`, (rows, columns) float32."""
        raise NotImplementedError

    def decided_grid(self) -> Grid:
        """The grid of the decision: the one it started on, or one with scales that were moved meanwhile."""
        return self.grid

    def undecided(self) -> int:
        """The number of weights that are not yet on their grid."""
        return 0

    def rounded(self) -> Rounded:
        """The decision with its grid, without gradient."""
        return Rounded(self.hard().detach(), self.decided_grid())


class Fixed(Rounding):
    """A rounding to given `values` of a grid, (rows, columns) float32, without parameters."""

    def __init__(self, grid: Grid, values: Tensor):
        super().__init__(grid)
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        return self.values

    hard = forward
