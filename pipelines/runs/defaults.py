"""Defaults of the commands. Imports nothing heavy, so that help texts can name it."""

from typing import Any

from dmquant.errors import UsageError, check_choice

DEFAULT_RECIPE = "default"
ENGINES = ("comfyui", "torchao", "modelopt", "bfl", "nunchaku-lite", "compressed-tensors", "gguf")
"""Engines that a model can be made for (dmquant.exchange.engines)."""
PURPOSES = {"speed": "fast", "quality": "default-lowrank", "size": "small"} | {name: f"for-{name}" for name in ENGINES}
"""Recipes by what matters most, or the engine that will run the model, as `--for` names it."""
EXPORTS = ("bfl", "comfyui", "compressed-tensors", "gguf", "modelopt", "nunchaku-lite", "torchao")
"""Formats of other engines that can be written (dmquant.exchange.formats)."""
LAYOUTS = ("dmquant", "torchao")
"""Layouts that a model folder can be written in: diffusers reads torchao's without dmquant."""
SWEEP_BITS, SWEEP_TECHNIQUES = "3-8", "rtn"


def named_recipe(recipe: str | None, purpose: str | None) -> str:
    """The recipe that was named, by itself or by what it is for; UsageError where it was named twice."""
    if purpose is None:
        return recipe or DEFAULT_RECIPE
    source = PURPOSES[check_choice("purpose", purpose, PURPOSES)]
    if recipe is not None:
        raise UsageError(f"--for {purpose} is --recipe {source}: leave out --recipe {recipe}, or --for")
    return source


def for_layout(layout: str, given: dict[str, Any]) -> dict[str, Any]:
    """Typed options with what a `layout` of others brings where no recipe is named: a recipe that it can hold, with
    inputs left alone unless they are given a format, so that it runs on any device. UsageError for another layout."""
    check_choice("layout", layout, LAYOUTS)
    if layout == LAYOUTS[0] or given["recipe"] is not None or given["purpose"] is not None:
        return given
    return given | {"purpose": layout, "a": given["a"] or "none"}
