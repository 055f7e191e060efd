"""A registry of knowledge about models that torch does not have; the core only asks it.

Registered are the layers that stay in high precision, the inputs that are concatenations (`keep: family` in a recipe),
and ways to save a model that was quantized in place so that it loads again.
"""

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from dmquant.errors import UserError
from dmquant.recipe import Known, Recipe
from dmquant.registry import engine_of

if TYPE_CHECKING:
    from torch import nn

USUAL = {
    "conv_in": "sees the noisy latents themselves",
    "*embed*": "embeds latents, timestep, text or size for the whole network",
    "img_in": "sees the noisy latents themselves",
    "txt_in": "runs on every text token before the first block",
    "time_extra_emb*": "conditions every block",
    "time_step_proj*": "conditions every block",
    "adaln_single*": "one embedding sets scale and shift of every block",
    "caption_projection*": "every cross-attention reads its output",
    "*stream_modulation*": "one layer sets scale, shift and gate of many blocks",
    "distilled_guidance_layer*": "one network sets scale, shift and gate of every block",
    "norm_out*": "scales and shifts all tokens just before they become noise",
    "proj_out": "its error goes straight into the predicted noise",
    "proj_out_[0-9]": "its error goes straight into the predicted noise",
    "conv_out": "its error goes straight into the predicted noise",
}
"""Globs of the usual names of layers at the raw latents, the timestep or the output: few, small, the first to hurt."""

Lookup = Callable[["nn.Module"], Known | None]
Recorder = Callable[["nn.Module", Recipe, Collection[str]], bool]
_lookups: list[Lookup] = []
_recorders: list[Recorder] = []


def knows_models(lookup: Lookup) -> Lookup:
    """Decorate a function that returns the knowledge of a model, None where it has none."""
    _lookups.append(lookup)
    return lookup


def records_quantization(recorder: Recorder) -> Recorder:
    """Decorate a function that writes into a model how it was quantized, so that it is saved with it.

    The function takes the model, the recipe with its rules written out and the names of the quantized layers, and
    returns whether it did so: not where the model is of another kind, or holds layers quantized otherwise.
    """
    _recorders.append(recorder)
    return recorder


def known(model: "nn.Module") -> Known:
    """The knowledge of a model by the first lookup that has any; the usual names where none has."""
    return next((found for lookup in _lookups if (found := lookup(model)) is not None), Known(USUAL))


def completed(recipe: Recipe, model: "nn.Module", about: Known | None = None) -> Recipe:
    """The recipe with its `keep: family` written out as rules for `model`, which need no lookup.

    `about` is what is known of it, by default what a lookup finds. Where the recipe is for an engine, the layers that
    it refuses are kept too.
    """
    if recipe.keep == "none":
        return recipe
    recipe = recipe.for_model(about or known(model))
    refused = engine_of(recipe.engine).refused(recipe, model) if recipe.engine else {}
    for reason, layers in refused.items():
        recipe = recipe.keeping(layers, reason)
    return recipe


def record(model: "nn.Module", recipe: Recipe, layers: Collection[str]) -> None:
    """Record how the `layers` of a model were quantized in place; a model without a recorder refuses to be saved.

    A model that cannot be saved keeps its `state_dict`.
    """
    recorded = any(recorder(model, recipe, layers) for recorder in _recorders)
    for name, part in model.named_modules():
        holds = any(layer.startswith(f"{name}." if name else "") for layer in layers)
        if holds and hasattr(part, "save_pretrained") and not (recorded and part is model):
            part.save_pretrained = functools.partial(refuse_to_save, type(part).__name__)  # which can be copied


def refuse_to_save(kind: str, *args: Any, **kwargs: Any) -> None:
    """Replaces a model's `save_pretrained`."""
    raise UserError(
        f"this {kind} was quantized in place in a way that its save_pretrained does not record, so it would "
        "load with random weights: save it before it is quantized, or torch.save its state_dict() and load that "
        "into one that dmquant.quantize_ made by the same recipe"
    )
