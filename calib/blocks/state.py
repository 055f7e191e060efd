"""The layers of a backbone on their way from a recipe's plan to the quantized layers that take their places."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from dmquant.activations import TimestepRanges
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.folding import without
from dmquant.calib.layers.ranges import check_timesteps
from dmquant.convert import LayerPlan, LayerReport, plan, relative_error, sharing
from dmquant.errors import UsageError
from dmquant.formats import Format
from dmquant.layers import QUANTIZED, QuantConv2d, QuantLinear, become_
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import Parts, fit_of


@dataclass
class LayerState:
    """A layer to be quantized, with all that is decided of it so far."""

    layer: nn.Linear | nn.Conv2d
    """In full precision; transforms may be folded into its weight and bias."""
    plan: LayerPlan
    ranges: TimestepRanges
    """The timestep ranges of the whole backbone."""
    parts: dict[str, Parts] = field(default_factory=dict)
    """Stored tensors of the layer's transforms, by transform and part."""
    input_scale: Tensor | None = None
    """Static scales of the input, float32 in the `scale_shape` of the plan's activations."""
    report: LayerReport | None = None
    """Filled in once the quantized layer is in its place."""

    @property
    def name(self) -> str:
        return self.plan.name

    def without_weight(self, quantizes_input: bool = True) -> QuantLinear | QuantConv2d:
        """The quantized layer to be, which can only transform and quantize inputs."""
        quantized = self._empty(self.plan.weights)
        if quantized.is_static:
            quantized.load_input_scale(self.input_scale)
        if not quantizes_input:
            quantized.activations = None
        return quantized

    def with_weight(self, weight: QuantizedTensor) -> QuantLinear | QuantConv2d:
        """The quantized layer with this weight, (out, in, ...) as the layer's, and the parts of its transforms."""
        quantized = self._empty(weight.spec)
        quantized.load_quantized(weight, self.layer.bias, self.input_scale)
        quantized.load_parts(self.parts)
        return quantized

    def keep_transforms(self, names: Collection[str]) -> None:
        """Take all other transforms out of the plan."""
        self.plan = replace(self.plan, transforms=tuple(one for one in self.plan.transforms if one.name in names))

    def drop_transform(self, name: str) -> None:
        """Take one transform out of the plan, which is folded into the layer before."""
        self.plan = without(self.plan, name)

    def choose_input_format(self, fmt: Format) -> None:
        """Put the format of the input, one of its candidates, into the plan."""
        self.plan = replace(self.plan, activations=replace(self.plan.activations, fmt=fmt))

    def put_in_place_(self, weight: QuantizedTensor) -> None:
        """Make the backbone's layer the quantized one with this weight, (out, in, ...) as the layer's."""
        quantized = self.with_weight(weight)
        self.plan = replace(self.plan, weights=weight.spec, candidates=())
        self.report = LayerReport(self.plan, relative_error(self.layer.weight, quantized))
        become_(self.layer, quantized)

    def _empty(self, spec: WeightSpec) -> QuantLinear | QuantConv2d:
        of_input, transforms = self.plan.activations, self.plan.transforms
        quantized = QUANTIZED[type(self.layer)].like(self.layer, spec, of_input, "meta", transforms)
        quantized.timestep_ranges = self.ranges
        return quantized.train(self.layer.training)


def plans_to_calibrate(backbone: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """`plan`, with a UsageError where there are no layers, or where two places of the model share a weight."""
    plans = sharing(backbone, plan(backbone, recipe))
    if not plans:
        raise UsageError(f"recipe '{recipe.name}' quantizes none of the layers of {type(backbone).__name__}")
    uses = Counter(id(weight) for _, weight in backbone.named_parameters(remove_duplicate=False))
    if shared := [step.name for step in plans if uses[id(backbone.get_submodule(step.name).weight)] > 1]:
        raise UsageError(
            f"layer {shared[0]} shares its weight with another place of the model, which calibration takes for a layer "
            "of its own: keep it in a rule, or use a recipe without data such as rtn"
        )
    return plans


def plan_layers(backbone: nn.Module, recipe: Recipe, store: CalibrationStore) -> dict[str, LayerState]:
    """The layers that `recipe` quantizes, by name in the backbone's order.

    Raises UsageError as `plans_to_calibrate` does, and UserError where the recipe tells timesteps apart that are none
    of 0..SCHEDULE.
    """
    plans = plans_to_calibrate(backbone, recipe)
    transforms = [transform for step in plans for transform in step.transforms]
    counts = {count for one in transforms for count in (one.timestep_ranges, fit_of(one).statistics)} - {0}
    if any(count > 1 for count in counts):
        check_timesteps(store)
    of_inputs = {step.activations.ranges for step in plans if step.activations and step.activations.ranges}
    ranges = TimestepRanges(of_inputs | counts)
    return {step.name: LayerState(backbone.get_submodule(step.name), step, ranges) for step in plans}


def plans_of(states: dict[str, LayerState]) -> dict[str, LayerPlan]:
    """Plans by name, as they are now."""
    return {name: state.plan for name, state in states.items()}
