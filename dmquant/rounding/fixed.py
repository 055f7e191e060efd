"""A rounding that is decided from the start."""

from torch import Tensor

from dmquant.grids import Grid
from dmquant.rounding.base import Rounding


class Fixed(Rounding):
    """These `values` of a grid, (rows, columns) float32; no parameters."""

    def __init__(self, grid: Grid, values: Tensor):
        super().__init__(grid)
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        return self.values

    def hard(self) -> Tensor:
        return self.values
