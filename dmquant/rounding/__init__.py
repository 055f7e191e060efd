"""Rounding methods: the choice of a grid value for each weight. One module here is one method, found by its name.

A method is a module, or any object, with

- `Options`: a pydantic model of the method's own settings in a recipe;
- `LEARNS`: whether it learns from data (then it needs the loop of `dmquant.calib.blocks.engine`);
- `NEEDS_MOMENTS`: whether it needs the second moments of the layer's inputs, in blocks of `Options.columns` columns;
- `start(grid, options)`: a `Rounding` of one weight. It starts at exactly the float weight or exactly
  nearest rounding. Where it needs moments, `start(grid, options, moments)`, with the sums (n, n) of one block of n
  columns after another, in the order of the grid's columns: a method that does not learn starts with its solution.

A method may move the scales: its rounding then ends on another grid than it started on (`Rounding.decided_grid`). It
may bring an optimizer of its own, and a course of the learning rate (`Rounding.optimizer`, `Rounding.rate`).
"""

from dmquant.grids import Grid
from dmquant.registry import Registry
from dmquant.rounding.base import Fixed, Rounded, Rounding

METHODS = Registry("rounding method", __name__, no_methods=("base", "straight"))
get_method, method_names, register = METHODS.get, METHODS.names, METHODS.register
