"""Nearest: every weight becomes the nearest value of its grid. What every other method is measured against."""

from pydantic import BaseModel

from dmquant.grids import Grid
from dmquant.rounding.base import Fixed

LEARNS = False
NEEDS_MOMENTS = False


class Options(BaseModel, extra="forbid"):
    """There is nothing to set."""


def start(grid: Grid, options: Options) -> Fixed:
    """Nearest rounding, from the start."""
    return Fixed(grid, grid.nearest)
