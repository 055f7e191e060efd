"""The interface of every rounding while it is decided."""

from typing import NamedTuple

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


class Rounding(nn.Module):
    """The rounding of one weight on a grid; its parameters are learned.

    `forward()` gives the weight to compute with while learning, (rows, columns) float32, differentiable.
    """

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def penalty(self, progress: float) -> Tensor | None:
        """A scalar to add to the loss, summed over the weights, when `progress` (0 to 1) of the steps are done."""
        return None

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
