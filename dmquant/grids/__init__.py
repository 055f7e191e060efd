"""Grids: the values that the weights of one layer may become. A specification's store says which kind."""

from dmquant.grids.base import Grid
from dmquant.grids.scaled import ScaledGrid
from dmquant.grids.table import TableGrid
from dmquant.stores import TABLE

__all__ = ["Grid", "ScaledGrid", "TableGrid", "grid_type"]

OTHER_THAN_SCALED: dict[str, type[Grid]] = {TABLE: TableGrid}


def grid_type(store: str) -> type[Grid]:
    """The kind of grid whose scales, or what it has instead, are stored so."""
    return OTHER_THAN_SCALED.get(store, ScaledGrid)
