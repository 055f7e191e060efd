"""Objectives: what the roundings of a unit are learned by. One module here is one objective, found by its name.

An objective is a module, or any object, with

- `Options`: a pydantic model of its own settings in a recipe (`learning.objective`);
- `start(data, options)`: an `Objective` of one unit, whose layers compute by their learners from then on.
"""

from dmquant.calib.objectives.base import Objective, UnitData, squared_error
from dmquant.registry import Registry

OBJECTIVES = Registry("objective", __name__, no_methods=("base",))
get_method, method_names, register = OBJECTIVES.get, OBJECTIVES.names, OBJECTIVES.register
