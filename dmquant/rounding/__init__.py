"""Rounding methods: which value of its grid each weight becomes. One module here is one method, found by its name.

A method is a module with

- `Options`: a pydantic model of the method's own settings in a recipe;
- `LEARNS`: whether it learns from data (then it needs the loop of `dmquant.calib.blocks.engine`);
- `NEEDS_MOMENTS`: whether it needs the second moments of the layer's inputs, in blocks of `Options.columns` columns;
- `start(grid, options)`: a `Rounding` of one weight. What it starts with is exactly the float weight or exactly
  nearest rounding. Where it needs moments, `start(grid, options, moments)`, with the sums (n, n) of one block of n
  columns after another, in the order of the grid's columns: a method that does not learn starts with its solution.
"""

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Protocol

from torch import Tensor

from dmquant.errors import unknown
from dmquant.grids import Grid

__all__ = ["Grid", "Rounding", "get_method", "method_names"]

_PARTS = ("fixed", "lean")  # modules here that are no methods


class Rounding(Protocol):
    """The rounding of one weight while it is decided; a `torch.nn.Module` whose parameters are what is learned."""

    def __call__(self) -> Tensor:
        """The weight to compute with while learning, (rows, columns) float32, differentiable."""
        ...

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss, summed over the weights, when `progress` (0 to 1) of the steps are done."""
        ...

    def hard(self) -> Tensor:
        """The decision as it stands: values of the grid, (rows, columns) float32."""
        ...

    def undecided(self) -> int:
        """How many weights are not yet on their grid."""
        ...


@functools.cache
def get_method(name: str) -> ModuleType:
    """The module of a rounding method; UsageError for a name there is none of."""
    if name not in method_names():
        raise unknown("rounding method", name, method_names(), f"known: {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def method_names() -> tuple[str, ...]:
    """Names of all rounding methods."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS))
