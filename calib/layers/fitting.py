"""Fit the transforms of a layer to its data, before its scales are fitted."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import Moments, fit_grid
from dmquant.convert import LayerPlan
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.rounding import gptq, nearest
from dmquant.scaling import to_matrix
from dmquant.transforms import InputStatistics, Storage, alternate, chains, fit_of

WORTH = 0.9  # share of the error without an optional transform; images gain nothing from one that leaves more of it

Candidate = TypeVar("Candidate")


@torch.no_grad()
def fit_transforms(
    layer: nn.Linear | nn.Conv2d,
    step: LayerPlan,
    quantized: QuantLinear | QuantConv2d,
    statistics: InputStatistics | None,
) -> Tensor:
    """Fit the transforms of a layer and load their parts into `quantized`; returns the transformed weight to quantize.

    The weight is float32 in the shape of the layer's, (out, in, ...). Each method takes its candidate of least error
    (`output_error`), and an optional transform is used where it is worth it (`WORTH`). Without statistics a layer has
    all of its transforms, each with the candidate that changes nothing.
    """
    sample = [] if statistics is None else with_outputs(layer, statistics.sample)

    def error(candidate: tuple) -> float:
        quantized.transforms, parts, weight = candidate
        quantized.load_parts(parts)
        return output_error(layer, step, quantized, weight, sample)

    def best(transforms: tuple[Storage, ...]) -> tuple:
        exact = layer.weight.detach().float()
        return choose(((transforms, *fitted) for fitted in chains(transforms, exact, statistics)), error)

    choices = _choices(step.transforms) if sample else [step.transforms]
    quantized.transforms, parts, weight = choose(map(best, choices), error, WORTH)
    quantized.load_parts(parts)
    return weight


def fit_to_codes(
    step: LayerPlan,
    quantized: QuantLinear | QuantConv2d,
    weight: Tensor,
    moments: Moments | None,
    method: ModuleType,
    options: gptq.Options,
) -> Tensor:
    """Fit the transforms of `quantized` that alternate with the codes (`dmquant.transforms.alternating`).

    `weight` is the result of `fit_transforms`, (out, in, ...) float32; returns the weight to quantize after the fit, of
    the same shape. Codes have the scales of least weight error meanwhile. They are rounded to nearest, or by GPTQ with
    `options` where the rounding `method` and a transform both need moments.
    """
    transforms = quantized.transforms
    fits = [fit_of(transform) for transform in transforms]
    if not any(fit.turns for fit in fits):
        return weight
    nearest_plan = replace(step, weights=replace(step.weights, scale="mse"), candidates=())
    weighed = moments is not None and moments.in_full and any(fit.by_moments for fit in fits)
    factors = moments.factors(options) if weighed else []

    def rounded(left: Tensor) -> Tensor:
        grid = fit_grid(left, nearest_plan, None)
        return grid.as_weight(gptq.solve(grid, factors)[0] if weighed and method.NEEDS_MOMENTS else grid.nearest)

    def seen(lost: Tensor) -> Tensor:
        return seen_by_output(to_matrix(lost, step.weights.split), factors) if weighed else lost.flatten(1)

    parts = {transform.name: quantized.parts(transform) for transform in transforms}
    parts, weight = alternate(transforms, parts, weight, rounded, seen)
    quantized.load_parts(parts)
    return weight


def seen_by_output(error: Tensor, factors: Sequence[gptq.Factor]) -> Tensor:
    """The error of a weight (rows, columns) times a root of the damped moments, same shape, in the factors' dtype.

    Its squared norm is the squared error of the outputs, as `gptq.solve` returns it.
    """
    parts, first = [], 0
    for order, root in factors:
        parts.append(error[:, first : first + len(order)][:, order].to(root.dtype) @ root)
        first += len(order)
    return torch.cat(parts, dim=1)


def choose(candidates: Iterable[Candidate], error: Callable[[Candidate], float], worth: float = 1.0) -> Candidate:
    """The candidate of least error among those below `worth` times the error of the first; the first where none is."""
    candidates = iter(candidates)
    best, least = next(candidates), None
    for candidate in candidates:
        if least is None:
            least = worth * error(best)
        if (its := error(candidate)) < least:
            best, least = candidate, its
    return best


def _choices(transforms: tuple[Storage, ...]) -> Iterator[tuple[Storage, ...]]:
    """The transforms without any optional one, then with one optional one or more."""
    optional = [transform for transform in transforms if fit_of(transform).optional]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            yield tuple(one for one in transforms if one not in optional or one in chosen)


def with_outputs(layer: nn.Linear | nn.Conv2d, sample: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of an input, (rows, ..., in) or (rows, in, height, width), and the float layer's output in float32."""
    return [(x, layer(x).float()) for x in sample]


def output_error(
    layer: nn.Linear | nn.Conv2d,
    step: LayerPlan,
    quantized: QuantLinear | QuantConv2d,
    weight: Tensor,
    sample: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Relative squared error of the output with `weight` rounded to nearest, summed over a sample of inputs.

    `weight` is the transformed weight, (out, in, ...) float32. `sample` pairs inputs (rows, ...) with their exact
    outputs. The error of each row is divided by the mean square of its exact output, so that no timestep, and no branch
    of the guidance, weighs more for its size. Transforms and their parts are taken from `quantized`; the scales
    are the scales of least weight error.
    """
    if not sample:
        return 0.0
    if quantized.timestep_ranges is not None:
        quantized.timestep_ranges.set(0.0)  # corrections by timestep are still zero, so any will do
    grid = fit_grid(weight, replace(step, weights=replace(step.weights, scale="mse"), candidates=()), None)
    learner = Learner(step.name, layer, grid, nearest.start(grid, nearest.Options()), quantized)
    error = 0.0
    for x, output in sample:
        wrong = learner.forward(x).float() - output
        powers = output.square().flatten(1).mean(1).clamp(min=1e-30)
        error += (wrong.square().flatten(1).mean(1) / powers).mean().item()
    return error
