"""The recipe of a calibrated model, with every choice that calibration made written out."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmquant.convert import LayerReport
from dmquant.recipe import Recipe, Rule, Transformation


def resolved_recipe(recipe: Recipe, reports: Sequence[LayerReport], input_formats: Mapping[str, str]) -> Recipe:
    """The recipe with the format of every layer, and of its input, named, so that it alone rebuilds the model.

    Transforms that were folded into the layer before, or left out, are not in it.
    """
    everywhere, decided, named = (recipe, *recipe.rules), {}, []
    if any(settings.candidates for settings in everywhere):
        decided["candidates"] = None
        named += _rules("weights", {report.plan.name: report.plan.weights.fmt.name for report in reports})
    if any(settings.activation_candidates for settings in everywhere):
        decided["activation_candidates"] = None
        named += _rules("activations", input_formats)
    named += _rules("transforms", _decided_transforms(recipe, reports))
    rules = [rule.model_copy(update=decided) for rule in recipe.rules]
    return recipe.model_copy(update=decided | {"rules": [*rules, *named]}) if decided or named else recipe


def _decided_transforms(recipe: Recipe, reports: Sequence[LayerReport]) -> dict[str, list[Transformation]]:
    """The transforms of layers that lost one: it was folded into the layer before, or the layer is nearer without."""
    settings, left = recipe.settings_by_layer(report.plan.name for report in reports), {}
    for report in reports:
        kept, asked = {one.name for one in report.plan.transforms}, settings[report.plan.name].transforms
        if any(one.method not in kept for one in asked):
            left[report.plan.name] = [one for one in asked if one.method in kept]
    return left


def _rules(key: str, values: Mapping[str, Any]) -> list[Rule]:
    """Rules that give each of these layers its value of a setting."""
    layers: dict[str, list[str]] = {}
    for name, value in values.items():
        layers.setdefault(repr(value), []).append(name)
    return [Rule(match=names, **{key: values[names[0]]}) for _, names in sorted(layers.items())]
