"""Objectives: what the roundings of a unit are learned by. One module here is one objective, found by its name.

An objective is a module, or any object, with

- `Options`: a pydantic model of its own settings in a recipe (`learning.objective`);
- `start(data, options)`: an `Objective` of one unit, whose layers compute by their learners from then on;
- `needs(options)`, which may be left out: what it needs of the unit's data beside its outputs, of TAIL, IMPORTANCE and
  SAME_INPUTS.
"""

from typing import Any

from dmquant.calib.objectives.base import (
    IMPORTANCE,
    SAME_INPUTS,
    TAIL,
    Objective,
    UnitData,
    sample_errors,
    squared_error,
)
from dmquant.registry import Registry

OBJECTIVES = Registry("objective", __name__, no_methods=("base",))
get_method, method_names, register = OBJECTIVES.get, OBJECTIVES.names, OBJECTIVES.register


def needs_of(objective: Any) -> frozenset[str]:
    """What an objective of a recipe needs, a `dmquant.settings.Objective`: of TAIL, IMPORTANCE and SAME_INPUTS."""
    needs = getattr(objective.definition, "needs", None)
    return needs(objective.checked) if needs else frozenset()
