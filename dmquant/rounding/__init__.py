"""Rounding methods: which value of its grid each weight becomes. One module here is one method, found by its name.

A method is a module, or any object, with

- `Options`: a pydantic model of the method's own settings in a recipe;
- `LEARNS`: whether it learns from data (then it needs the loop of `dmquant.calib.blocks.engine`);
- `NEEDS_MOMENTS`: whether it needs the second moments of the layer's inputs, in blocks of `Options.columns` columns;
- `start(grid, options)`: a `Rounding` of one weight. What it starts with is exactly the float weight or exactly
  nearest rounding. Where it needs moments, `start(grid, options, moments)`, with the sums (n, n) of one block of n
  columns after another, in the order of the grid's columns: a method that does not learn starts with its solution.

A method may move the scales: its rounding then ends on another grid than it started on (`Rounding.decided_grid`).
"""

import functools
import importlib
import pkgutil
from typing import Any

from dmquant.errors import UsageError, unknown
from dmquant.grids import Grid
from dmquant.rounding.base import Rounded, Rounding

__all__ = ["Grid", "Rounded", "Rounding", "get_method", "method_names", "register"]

_NO_METHODS = ("base", "fixed", "lean")
_registered: dict[str, Any] = {}


def register(name: str, method: Any) -> None:
    """Make a rounding method from outside known to recipes; UsageError where there is one of this name."""
    if name in method_names():
        raise UsageError(f"there is a rounding method '{name}' already: give the other one another name")
    _registered[name] = method


def get_method(name: str) -> Any:
    """A rounding method; UsageError for a name there is none of."""
    if name in _registered:
        return _registered[name]
    if name not in _own_names():
        raise unknown("rounding method", name, method_names(), f"known: {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}")


def method_names() -> tuple[str, ...]:
    """Names of all rounding methods."""
    return tuple(sorted((*_own_names(), *_registered)))


@functools.cache
def _own_names() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_METHODS)
