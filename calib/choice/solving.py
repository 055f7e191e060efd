"""A layer solved in every format that it may have: its codes, and the error of its output."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dmquant.calib.layers.fitting import fit_transforms
from dmquant.calib.layers.moments import Moments, alike, columns_of, has_columns
from dmquant.calib.layers.rounder import Rounder
from dmquant.convert import LayerPlan
from dmquant.layers import QUANTIZED
from dmquant.qtensor import QuantizedTensor
from dmquant.recipe import Recipe
from dmquant.scaling import DATA_RULES, to_matrix
from dmquant.transforms import Parts


@dataclass(frozen=True)
class Solved:
    """A layer's weight in one format: codes, the stored parts of transforms, and the mean squared error of the output,
    summed over its channels, for inputs whose rows have an RMS of 1."""

    weight: QuantizedTensor
    parts: Mapping[str, Parts]
    error: float

    def float_weight(self, layer: nn.Linear | nn.Conv2d, step: LayerPlan) -> Tensor:
        """The weight as quantized, (out, in, ...) float32, on the layer's device."""
        quantized = QUANTIZED[type(layer)].like(layer, self.weight.spec, None, "meta", step.transforms)
        quantized.load_quantized(self.weight, None)
        quantized.load_parts(dict(self.parts))
        return quantized.float_weight()


def quick(recipe: Recipe) -> Recipe:
    """The recipe as far as costs need it: where it takes data, scales of least weight error, and roundings solved once.

    What it does beyond that gains much the same in every format, so that costs compare.
    """
    if not recipe.calibrated:
        return recipe
    solver = recipe.rounding.solver
    options = solver.options if solver.method == "gptq" else {}
    rounding = {"method": "gptq", **options, "sweeps": 0}
    return recipe.with_settings(rounding=rounding, scale="mse", rules=[])


def empty_moments(layer: nn.Module, plans: Mapping[str, LayerPlan], device: torch.device) -> Moments | None:
    """Moments to collect a layer's inputs in, for all of its options; None for a convolution without columns."""
    if not has_columns(layer):
        return None
    widest = max((step.weights for step in plans.values()), key=lambda spec: spec.granularity.size or 0)
    return Moments(tuple(layer.weight.shape), widest, device, together=8192)


@contextmanager
def collecting(layers: Mapping[str, nn.Module], moments: Mapping[str, Moments]) -> Iterator[None]:
    """Add the inputs of layers, by name, to their moments until the block ends; rows count alike, as in calibration."""

    def adding(layer: nn.Module, one: Moments) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: one.add(columns_of(layer, alike(args[0].detach())))

    with ExitStack() as stack, torch.no_grad():
        for name, one in moments.items():
            stack.callback(layers[name].register_forward_pre_hook(adding(layers[name], one)).remove)
        yield


@torch.no_grad()
def solve(
    layer: nn.Linear | nn.Conv2d, plans: Mapping[str, LayerPlan], rounder: Rounder, moments: Moments | None
) -> dict[str, Solved]:
    """The layer in each option that it has a plan for; without moments errors are those of its weight."""
    exact = layer.weight.detach().float()
    found = {}
    for option, step in plans.items():
        if step.weights.scale in DATA_RULES:  # an option's own
            step = replace(step, weights=replace(step.weights, scale="mse"))
        quantized = QUANTIZED[type(layer)].like(layer, step.weights, None, "meta", step.transforms)
        weight = fit_transforms(layer, step, quantized, None)
        learner = rounder.start(layer, step, quantized, weight, moments)
        values = learner.rounding.values
        codes = QuantizedTensor.of(learner.grid, values)
        parts = {one.name: quantized.parts(one) for one in quantized.transforms}
        solved = Solved(codes, parts, math.nan)
        error = solved.float_weight(layer, replace(step, transforms=quantized.transforms)) - exact
        matrix = to_matrix(error, step.weights.split)
        lost = matrix.square().sum().item() if moments is None else moments.output_error(matrix)
        found[option] = replace(solved, error=lost)
    return found
