"""The recipe of a calibrated model, with every choice that calibration made written out."""

from collections.abc import Mapping, Sequence

from dmquant.convert import LayerReport
from dmquant.recipe import Recipe, Rule


def resolved_recipe(recipe: Recipe, reports: Sequence[LayerReport], input_formats: Mapping[str, str]) -> Recipe:
    """The recipe with the format of every layer, and of its input, named, so that it alone rebuilds the model."""
    everywhere, decided, named = (recipe, *recipe.rules), {}, []
    if any(settings.candidates for settings in everywhere):
        decided["candidates"] = None
        named += _rules("weights", {report.plan.name: report.plan.weights.fmt.name for report in reports})
    if any(settings.activation_candidates for settings in everywhere):
        decided["activation_candidates"] = None
        named += _rules("activations", input_formats)
    rules = [rule.model_copy(update=decided) for rule in recipe.rules]
    return recipe.model_copy(update=decided | {"rules": [*rules, *named]}) if decided else recipe


def _rules(key: str, values: Mapping[str, str]) -> list[Rule]:
    """Rules that give each of these layers its value of a setting."""
    layers: dict[str, list[str]] = {}
    for name, value in values.items():
        layers.setdefault(value, []).append(name)
    return [Rule(match=names, **{key: value}) for value, names in sorted(layers.items())]
