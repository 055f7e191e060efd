"""Grids: the values that the weights of one layer may become. A specification's store says which kind."""

from dmquant.grids.base import Grid
from dmquant.grids.levels import LevelGrid
from dmquant.grids.scaled import ScaledGrid
from dmquant.grids.table import TableGrid
from dmquant.stores import LEVELS, TABLE

OTHER_THAN_SCALED: dict[str, type[Grid]] = {TABLE: TableGrid, LEVELS: LevelGrid}


def grid_type(store: str) -> type[Grid]:
    """The kind of grid whose scales, or tables, are in this store."""
    return OTHER_THAN_SCALED.get(store, ScaledGrid)
