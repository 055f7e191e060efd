"""Parts of a pipeline beside its backbone, such as text encoders, quantized without data by the rules on them."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from dmquant.convert import component_names, component_recipe, plan_without_data, quantize_
from dmquant.errors import UsageError, UserError, unknown
from dmquant.host.console import Console
from dmquant.host.units import size_text
from dmquant.pipelines.runs.footprint import footprint
from dmquant.recipe import Recipe
from dmquant.settings import Rule, Settings, format_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BYTES_IN_16_BIT = 2


def with_components(recipe: Recipe, given: Iterable[str]) -> Recipe:
    """The recipe with a rule for each `NAME=RECIPE` that was typed, after all other rules.

    RECIPE is any that takes no data, by name, bits or file. UsageError for what is not of that form, and for a recipe
    that takes data.
    """
    rules = list(recipe.rules)
    for entry in given:
        name, separator, source = entry.partition("=")
        if not (name and separator and source):
            raise UsageError(f"--component {entry}: write NAME=RECIPE, as in text_encoder=w8a16")
        one = Recipe.load(source)
        if one.calibrated:
            raise UsageError(
                f"--component {entry}: recipe {one.name} takes calibration data; take one without, as w8a16"
            )
        settings = {key: getattr(one, key) for key in Settings.model_fields}
        rules.append(Rule(match="*", component=name, **settings))
        rules += [rule.model_copy(update={"component": name}) for rule in one.rules]
    return recipe.with_settings(rules=rules)


def check_names(recipe: Recipe, parts: Iterable[str], backbone: str) -> None:
    """UsageError for a rule on a part that a pipeline with these `parts` has not, or on its backbone."""
    for name in component_names(recipe):
        if name == backbone:
            raise UsageError(f"component: {name} is the backbone, which rules without a component are about")
        if name not in parts:
            raise unknown("component", name, parts, f"the pipeline has {', '.join(parts)}")
        component_recipe(recipe, name)


def check_components(pipeline: "DiffusionPipeline", recipe: Recipe) -> None:
    """UserError for a part that rules name and cannot be quantized, before hours of work on the backbone."""
    for name in component_names(recipe):
        part = getattr(pipeline, name, None)
        if not isinstance(part, nn.Module):
            raise UserError(f"component {name} of this pipeline is a {type(part).__name__}, which has no layers")
        own = component_recipe(recipe, name)
        _check_encoder(part, own)
        plan_without_data(part, own)


def quantize_components(
    pipeline: "DiffusionPipeline", recipe: Recipe, console: Console, finish: Callable[[nn.Module], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Quantize in place the parts that rules of the recipe name, and `finish` each; what a report says of it, by name.

    Numbers of layers and of weights, bits a quantized weight, and bytes, also of the same in 16 bit.
    """
    facts = {}
    for name in component_names(recipe):
        part = getattr(pipeline, name)
        elements = sum(tensor.numel() for tensor in part.state_dict().values())
        with console.bar(f"quantizing {name}") as bar:
            layers = quantize_(
                part, component_recipe(recipe, name), lambda done, total, layer, bar=bar: bar(done, total)
            )
        if finish is not None:
            finish(part)
        size = footprint(part)
        formats = sorted({format_name(layer.plan.weights.fmt.name) for layer in layers})
        facts[name] = {
            "layers": len(layers),
            "formats": formats,
            "quantized_weights": size.quantized_weights,
            "bits_per_quantized_weight": size.bits_per_weight,
            "size_bytes": size.bytes,
            "full_precision_bytes": BYTES_IN_16_BIT * elements,
        }
        console.say(f"{name}: {described(facts[name])}")
    return facts


def described(facts: dict[str, Any]) -> str:
    """One line on a quantized part, of what `quantize_components` says of it."""
    return (
        f"{facts['layers']} layers in {' and '.join(facts['formats'])}, "
        f"{facts['bits_per_quantized_weight']:.2f} bits a quantized weight; {size_text(facts['size_bytes'])} "
        f"({size_text(facts['full_precision_bytes'])} in 16 bit)"
    )


def _check_encoder(part: nn.Module, recipe: Recipe) -> None:
    from transformers import PreTrainedModel

    if isinstance(part, PreTrainedModel):
        from dmquant.transformers.encoders import check_known

        check_known(part, recipe)
