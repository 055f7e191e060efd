"""Swap the layers of a module for quantized ones, as a recipe says."""

import functools
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UsageError
from dmquant.formats import Format, get_format
from dmquant.layers import QUANTIZED, QuantConv2d, QuantLinear, become_, quantize_layer
from dmquant.matching import without_match
from dmquant.models import completed, known, record
from dmquant.qtensor import FASTER, WeightSpec, check_finite
from dmquant.recipe import Recipe, recipe_names
from dmquant.settings import NO_FORMAT, Rule
from dmquant.stores import get_store
from dmquant.transforms import Storage, create, fold_first_

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerPlan:
    """The specifications and transforms that a recipe gives one layer."""

    name: str
    weights: WeightSpec
    activations: ActivationSpec | None
    candidates: tuple[Format, ...] = ()
    """Formats to choose from by output error; empty where the recipe names one."""
    activation_candidates: tuple[Format, ...] = ()
    """Formats of the input to choose from, likewise."""
    transforms: tuple[Storage, ...] = ()
    """Transforms in the order in which they apply."""


@dataclass(frozen=True)
class LayerReport:
    """A quantized layer's plan, and the relative squared error of its weight."""

    plan: LayerPlan
    error: float


def plan(module: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """Plans of the Linear and Conv2d layers of `module` by `recipe`, in the module's order; kept layers have none.

    Plans depend on names and shapes alone, so that a checkpoint's skeleton on the meta device gets the same ones.
    Raises UsageError, naming the layer, for one that is not plain weights, for a split that does not cut its input
    channels in two, and for a transform that it cannot have.
    """
    for name, part in module.named_modules():
        if reason := _obstacle(part):
            raise UsageError(f"{f'layer {name}' if name else type(module).__name__} {reason}")
    plans = []
    layers = layers_in(module)
    recipe = completed(recipe, module)
    for name, settings in recipe.settings_by_layer(layers).items():
        if settings is None:
            continue
        layer = layers[name]
        if split := settings.split or None:
            _check_split(name, layer, split)
        weights = WeightSpec.parse(settings.weights, settings.granularity, settings.scale, settings.store, split)
        activations = None
        if settings.activations != NO_FORMAT:
            granularity = settings.activation_granularity
            if granularity == "product":
                granularity = "token" if math.prod(layer.weight.shape[2:]) == 1 else "image"
            activations = ActivationSpec.parse(
                settings.activations,
                granularity,
                scale=settings.activation_scale,
                split=split,
                rule=settings.activation_rule,
                center=settings.activation_center,
                engine=recipe.engine,
            )
        candidates = tuple(map(get_format, settings.candidates or ()))
        of_input = tuple(map(get_format, settings.activation_candidates or ())) if activations else ()
        try:
            transforms = create(settings.check_transforms(), layer, split)
        except UsageError as error:
            raise UsageError(f"layer {name}: {error}") from None
        plans.append(LayerPlan(name, weights, activations, candidates, of_input, transforms))
    return plans


def plan_without_data(module: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """`plan`, with a UsageError for a recipe that needs calibration data or quantizes no layer."""
    if recipe.calibrated:
        raise UsageError(
            f"recipe '{recipe.name}' needs calibration data: use `dmquant run` or `dmquant quantize`, "
            "or a recipe without data such as rtn"
        )
    if not (plans := plan(module, recipe)):
        raise UsageError(f"recipe '{recipe.name}' quantizes none of the layers of {type(module).__name__}")
    return plans


def sharing(module: nn.Module, plans: list[LayerPlan]) -> list[LayerPlan]:
    """The plans, with the largest magnitude of all layers of a group that other engines have as one layer
    (`Known.joint`) where these have one scale, or one base of scales, for the whole tensor: it becomes theirs."""
    found = {step.name: step for step in plans}
    for group in known(module).joint:
        steps = [found[name] for name in group if name in found]
        if {step.weights.granularity.kind for step in steps} != {"tensor"} and {
            get_store(step.weights.store).base_of for step in steps
        } != {"tensor"}:
            continue
        amplitude = max(module.get_submodule(step.name).weight.detach().abs().amax().item() for step in steps)
        found |= {one.name: replace(one, weights=replace(one.weights, amplitude=amplitude)) for one in steps}
    return list(found.values())


def layers_in(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a module that a recipe can quantize, by name, in the module's order."""
    return {name: layer for name, layer in module.named_modules() if type(layer) in QUANTIZED}


def quantize_(module: nn.Module, recipe: Recipe | str, progress: Progress | None = None) -> list[LayerReport]:
    """Replace the layers of `module` by quantized ones in place, round to nearest, without data.

    A diffusers model is saved as quantized; another model with a `save_pretrained` refuses to be saved by it.
    `progress(done, total, name)` is called after each layer. Raises UsageError, before anything changes, if no layer is
    left to quantize or one is not plain finite weights (adapters, compiled), or the recipe needs calibration data.
    """
    if not isinstance(module, nn.Module) or type(module) in QUANTIZED:
        raise UsageError(f"{type(module).__name__} is no module that holds layers: give one, such as pipe.transformer")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if warning := unmatched(module, recipe):
        logging.getLogger("dmquant").warning(warning)
    recipe = completed(recipe, module)
    reports = quantize_layers_(module, recipe, progress)
    record(module, recipe, [report.plan.name for report in reports])
    return reports


def quantize_layers_(module: nn.Module, recipe: Recipe, progress: Progress | None = None) -> list[LayerReport]:
    """`quantize_` for a caller that records in the module itself what became of it."""
    plans = plan_without_data(module, recipe)
    for step in plans:
        check_finite(module.get_submodule(step.name).weight, f"layer {step.name}: ")
    fold_first_(module, {step.name: step.transforms for step in plans})
    plans, reports = sharing(module, plans) if recipe.engine else plans, []
    for done, step in enumerate(plans, start=1):
        layer = module.get_submodule(step.name)
        quantized = quantize_layer(layer, step.weights, step.activations, transforms=step.transforms)
        reports.append(LayerReport(step, relative_error(layer.weight, quantized)))
        become_(layer, quantized)
        if progress:
            progress(done, len(plans), step.name)
    return reports


def component_recipe(recipe: Recipe, component: str) -> Recipe | None:
    """The recipe of a part of the pipeline beside the backbone, made of the rules that name it; None without any.

    What its rules do not set is as in an empty recipe, not as for the backbone, and no engine's. UsageError for rules
    that take calibration data, which there is for the backbone alone.
    """
    rules = [rule.model_copy(update={"component": None}) for rule in recipe.rules if rule.component == component]
    if not rules:
        return None
    plain = {"name": recipe.name, "description": recipe.description, "weights": NO_FORMAT}
    found = Recipe.from_dict(plain | {"rules": [rule.model_dump() for rule in rules]}, f"the {component}")
    if found.calibrated:
        raise UsageError(f"the rules of component {component} take calibration data, which only the backbone has")
    return found


def component_names(recipe: Recipe) -> list[str]:
    """The parts of the pipeline beside the backbone that rules of a recipe name, each once."""
    return list(dict.fromkeys(rule.component for rule in recipe.rules if rule.component is not None))


def of_backbone(recipe: Recipe) -> Recipe:
    """The recipe without the rules on other parts of the pipeline."""
    return recipe.model_copy(update={"rules": [rule for rule in recipe.rules if rule.component is None]})


@functools.cache
def _shipped_rules() -> list[Rule]:
    """The rules of all recipes that come with dmquant."""
    return [rule for name in recipe_names() for rule in Recipe.load(name).rules]


def unmatched(module: nn.Module, recipe: Recipe) -> str | None:
    """A line on the patterns of a recipe's rules, but dmquant's and the family's, that match no layer of `module`."""
    rules, of_family = of_backbone(recipe).rules, known(module).keep
    own = [rule.match for rule in rules if rule not in _shipped_rules()]
    missed = ", ".join(f"'{pattern}'" for pattern in without_match(own, layers_in(module)) if pattern not in of_family)
    line = f"recipe '{recipe.name}': no layer of {type(module).__name__} matches {missed}, so that changes nothing"
    return line if missed else None


def relative_error(weight: Tensor, quantized: QuantLinear | QuantConv2d) -> float:
    """Squared error of a quantized layer over its squared float weight (out, in, ...); at least float32 sums."""
    if faster := importlib.import_module(FASTER).relative_error(weight.detach(), quantized):
        return faster
    exact = weight.detach().float()
    return ((quantized.float_weight() - exact).square().sum() / exact.square().sum().clamp(min=1e-30)).item()


def _obstacle(part: nn.Module) -> str | None:
    """Why a part of a module cannot be quantized as it is, and what to do; None for most."""
    if hasattr(part, "_orig_mod"):
        return "is compiled: quantize it first, then torch.compile it"
    if hasattr(part, "base_layer"):
        return "holds LoRA adapters: merge or unload them, then quantize"
    if (other := getattr(part, "quantization_method", None) or "dmquant") != "dmquant":
        return f"is quantized by {str.__str__(other)} already: start from the full-precision model"
    if not isinstance(part, tuple(QUANTIZED)) or isinstance(part, tuple(QUANTIZED.values())):
        return None
    weight = part._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        found = "no plain weight" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        return (
            f"holds {found}, as other quantizers, casting hooks, weight_norm and prune make it: start from a plain one"
        )
    if getattr(part.forward, "__func__", None) is not type(part).forward:
        return "has a forward of its own, as offloading and casting hooks give it: quantize first, then put them on"
    return None


def _check_split(name: str, layer: nn.Linear | nn.Conv2d, split: int) -> None:
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise UsageError(f"layer {name} is a grouped convolution: its input cannot be split")
    if not (channels := layer.weight.shape[1]) > split > 0:
        raise UsageError(f"layer {name} has {channels} input channels, which a split of {split} does not cut in two")
