"""Nearest: every weight becomes the nearest value of its grid. Every other method is measured against it."""

from pydantic import BaseModel

from dmquant.grids import Grid
from dmquant.rounding.base import Fixed

LEARNS = False
NEEDS_MOMENTS = False


class Options(BaseModel, extra="forbid"):
    """Options of nearest rounding in a recipe: none."""


def start(grid: Grid, options: Options) -> Fixed:
    """Nearest rounding, from the start."""
    return Fixed(grid, grid.nearest)
