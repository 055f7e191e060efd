"""Nearest: every weight becomes the nearest value of its grid. What every other method is measured against."""

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dmquant.rounding.grid import Grid

LEARNS = False
NEEDS_MOMENTS = False


class Options(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(extra="forbid")


class Nearest(nn.Module):
    """A rounding without parameters."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.register_buffer("values", grid.nearest)

    def forward(self) -> Tensor:
        return self.values

    def penalty(self, progress: float) -> None:
        return None

    def hard(self) -> Tensor:
        return self.values

    def undecided(self) -> int:
        return 0


def start(grid: Grid, options: Options) -> Nearest:
    """Nearest rounding, from the start."""
    return Nearest(grid)
