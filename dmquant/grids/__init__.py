"""Grids: the values that the weights of one layer may become. A specification's store says which kind."""

import importlib

from dmquant.grids.base import Grid
from dmquant.grids.scaled import ScaledGrid
from dmquant.grids.table import TableGrid
from dmquant.stores import LEVELS, TABLE

OTHER_THAN_SCALED: dict[str, type[Grid]] = {TABLE: TableGrid}
ABOVE = {LEVELS: ("dmquant.exchange.levels", "LevelGrid")}  # of another engine; by name alone, since it stands above


def grid_type(store: str) -> type[Grid]:
    """The kind of grid whose scales, or tables, are in this store."""
    if store in ABOVE:
        module, name = ABOVE[store]
        return getattr(importlib.import_module(module), name)
    return OTHER_THAN_SCALED.get(store, ScaledGrid)
