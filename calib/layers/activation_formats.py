"""Choose the format of each layer's input among several of one size: the least error of the output."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, TimestepRanges
from dmquant.calib.data.watching import Run, Watchers, run_watched
from dmquant.calib.layers.ranges import scales_seen
from dmquant.convert import LayerPlan
from dmquant.formats import Format
from dmquant.layers import QUANTIZED

if TYPE_CHECKING:
    from dmquant.calib.data.store import CalibrationStore


@torch.inference_mode()
def choose_activation_formats(
    backbone: nn.Module,
    plans: Mapping[str, LayerPlan],
    store: "CalibrationStore",
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Format]:
    """The `activation_candidates` of least squared error of their layer's output, one for each plan.

    Runs the full-precision backbone over the samples that are not held out; every row counts with the mean square of
    its input divided out. Static scales are fitted for each candidate first, a pass over the data each. A layer that no
    sample reaches takes its first candidate.
    """
    timesteps = TimestepRanges(plan.activations.ranges for plan in plans.values() if plan.activations.ranges)

    def run(watchers: Watchers) -> None:
        run_watched(backbone, watchers, store, batch_size, timesteps.set, progress)

    return formats_of_least_error(backbone, plans, timesteps, run)


@torch.inference_mode()
def formats_of_least_error(
    backbone: nn.Module, plans: Mapping[str, LayerPlan], timesteps: TimestepRanges, run: Run
) -> dict[str, Format]:
    """`choose_activation_formats` on the inputs that `run` shows to watchers; it sets the `timesteps` of each call."""
    inputs = {name: _inputs(backbone, name, plan) for name, plan in plans.items()}
    for number in range(max(map(len, inputs.values()))):
        static = {name: layers[number] for name, layers in inputs.items() if len(layers) > number}
        static = {name: layer for name, layer in static.items() if layer.is_static}
        specs: dict[str, ActivationSpec] = {name: layer.activations for name, layer in static.items()}
        fitted = scales_seen(backbone, specs, timesteps, run) if specs else {}
        for name, scale in fitted.items():
            inputs[name][number].load_input_scale(scale)
            inputs[name][number].timestep_ranges = timesteps
    errors = {name: torch.zeros(len(layers), dtype=torch.float64) for name, layers in inputs.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            mean_square = x.double().flatten(1).square().mean(1).clamp(min=1e-60)
            for number, quantized in enumerate(inputs[name]):
                lost = _output(layer, quantized.quantize_input(x) - x).double().flatten(1).square().mean(1)
                errors[name][number] += (lost / mean_square).sum().cpu()

        return add

    run({name: watch(name) for name in inputs})
    return {name: plan.activation_candidates[int(errors[name].argmin())] for name, plan in plans.items()}


def _inputs(backbone: nn.Module, name: str, plan: LayerPlan) -> list[nn.Module]:
    """Layers without weights that quantize their input to each candidate."""
    layer = backbone.get_submodule(name)
    specs = [replace(plan.activations, fmt=fmt) for fmt in plan.activation_candidates]
    return [QUANTIZED[type(layer)].like(layer, plan.weights, spec, device="meta") for spec in specs]


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight)
    return layer._conv_forward(x, layer.weight, None)
