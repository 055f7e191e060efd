"""The formats that every layer may be given, and the bytes that it takes in each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dmquant.convert import LayerPlan, plan
from dmquant.errors import UsageError
from dmquant.packing import packed_size
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.registry import engine_of
from dmquant.settings import NO_FORMAT, Transformation
from dmquant.stores import TABLES, get_store

BITS_KEPT = 16
STORES = {"nl3": "e3m4", "nl4": "e3m4"}  # whose values are not symmetric, so that a scale of either sign helps
LADDER = (
    *(("nl3", "group:32"), ("nl3", "group:16")),
    *(("{own}", "channel"), ("nl4", "group:64"), ("nl4", "group:16"), ("{own}", "group:16")),
    *(("fp5_e2m2", "channel"), ("fp5_e2m2", "group:32"), ("fp6_e2m3", "group:32"), ("fp8_e4m3", "group:64")),
)
"""Weights from 3.25 to 8.13 bits with scales of one byte; `{own}` is the recipe's format where that has four bits."""
FOUR_BITS, BRANCH = "fp4_e2m1", "lowrank"
RANKS = (0.5, 2)  # times that of the recipe's low-rank branch


@dataclass(frozen=True)
class Option:
    """A way to quantize a layer: settings of a recipe's rule, by a name that tells them to people."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def options_of(recipe: Recipe, formats: Sequence[str] | None = None) -> list[Option]:
    """The options of all layers under a recipe, the recipe's own first.

    For an engine they are the weights that it runs, with the inputs that go with them. Otherwise they are LADDER; for a
    recipe with a low-rank branch LADDER is without it, and beside that are its own weights with other ranks. `formats`
    are the only formats of weights to choose among. Raises UsageError where less than two options are left.
    """
    found = [_own(recipe), *(_of_engine(recipe) if recipe.engine else [*_of_ladder(recipe), *_of_ranks(recipe)])]
    if formats is not None:
        found = [one for one in found if one.settings.get("weights", recipe.weights) in formats]
    names = [one.name for one in found]
    found = [one for place, one in enumerate(found) if one.name not in names[:place]]
    if len(found) < 2:
        said = ", ".join(formats or ()) or "this recipe"
        raise UsageError(f"there is nothing to choose from with {said}: name two formats of weights or more")
    return found


def plans_by_option(backbone: nn.Module, recipe: Recipe, options: Sequence[Option]) -> dict[str, dict[str, LayerPlan]]:
    """Plans by layer and option; an option that a layer cannot have (a transform that it does not take) is left out.

    `recipe` decides the layers.
    """
    found: dict[str, dict[str, LayerPlan]] = {}
    for option in options:
        for step in plan(backbone, recipe.with_settings(**option.settings)):
            found.setdefault(step.name, {})[option.name] = step
    return found


def stored_bytes(step: LayerPlan, shape: tuple[int, ...]) -> int:
    """Bytes of a weight (out, in, ...) as a plan stores it: codes, scales, and what transforms add."""
    spec: WeightSpec = step.weights
    columns = math.prod(shape[1:])
    scales = math.prod(spec.scale_shape(shape)) * get_store(spec.store).dtype.itemsize
    base = spec.base_shape(shape)
    parts = [part for one in step.transforms for part in one.parts().values()]
    added = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
    return shape[0] * packed_size(columns, spec.fmt.bits) + scales + (4 * math.prod(base) if base else 0) + added


def _own(recipe: Recipe) -> Option:
    branch = _branch(recipe)
    return Option(_name(recipe.weights, recipe.granularity, f"rank:{branch.checked.rank}" if branch else ""))


def _branch(recipe: Recipe) -> Transformation | None:
    """The recipe's low-rank branch."""
    return next((one for one in recipe.transforms if one.method == BRANCH), None)


def _of_ladder(recipe: Recipe) -> list[Option]:
    own = recipe.weights if _bits(recipe.weights) == 4 else FOUR_BITS
    pairs = [(name.format(own=own), granularity) for name, granularity in LADDER]
    store = recipe.store if recipe.store not in TABLES else "e4m3"
    others = [one.model_dump() for one in recipe.transforms if one.method != BRANCH]
    without = {"transforms": others} if _branch(recipe) else {}
    return [
        Option(
            _name(*pair), {"weights": pair[0], "granularity": pair[1], "store": STORES.get(pair[0], store), **without}
        )
        for pair in pairs
    ]


def _of_ranks(recipe: Recipe) -> list[Option]:
    """The recipe's own weights with other ranks of its low-rank branch."""
    branch = _branch(recipe)
    if branch is None:
        return []
    others = [one.model_dump() for one in recipe.transforms if one is not branch]
    ranks = sorted({max(1, round(branch.checked.rank * share)) for share in RANKS})
    return [
        Option(
            _name(recipe.weights, recipe.granularity, f"rank:{rank}"),
            {"transforms": [*others, branch.model_dump() | {"rank": rank}]},
        )
        for rank in ranks
    ]


def _of_engine(recipe: Recipe) -> list[Option]:
    """What an engine runs beside the recipe's own weights, each with the inputs that it prefers."""
    preferred: dict[str, Mapping[str, Any]] = {}
    for settings in engine_of(recipe.engine).formats.values():
        preferred.setdefault(settings["weights"], settings)
    return [Option(_name(name, settings["granularity"]), settings) for name, settings in preferred.items()]


def _name(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _bits(name: str) -> int:
    if name == NO_FORMAT:
        return BITS_KEPT
    return WeightSpec.parse(name, "group:64").fmt.bits
