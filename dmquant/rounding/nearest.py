"""Nearest: every weight becomes the nearest value of its grid. What every other method is measured against."""

from pydantic import BaseModel, ConfigDict

from dmquant.grids import Grid
from dmquant.rounding.fixed import Fixed

LEARNS = False
NEEDS_MOMENTS = False


class Options(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(extra="forbid")


def start(grid: Grid, options: Options) -> Fixed:
    """Nearest rounding, from the start."""
    return Fixed(grid, grid.nearest)
