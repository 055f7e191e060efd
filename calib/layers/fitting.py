"""Fit the transforms of a layer to its data, before its scales are."""

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

WORTH = 0.9  # of the error without an optional transform; images do not gain from what takes less off a layer's own

Candidate = TypeVar("Candidate")


@torch.no_grad()
def fit_transforms(
    layer: nn.Linear | nn.Conv2d,
    step: LayerPlan,
    quantized: QuantLinear | QuantConv2d,
    statistics: InputStatistics | None,
) -> Tensor:
    """Give `quantized` the transforms of a layer with their parts; returns the weight that is to be quantized, float32.

    Of a method's candidates that of the least error is taken, and an optional transform where it is worth it (`WORTH`).
    Without statistics a layer has all of its transforms, and of each the candidate that changes nothing.
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

    `weight` is what `fit_transforms` leaves to be quantized; returns what is left then. Codes are meanwhile those of
    the scales of least weight error: to nearest, or GPTQ's with `options` where the rounding `method` needs moments and
    so do they.
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
        return gptq.seen(to_matrix(lost, step.weights.split), factors) if weighed else lost.flatten(1)

    parts = {transform.name: quantized.parts(transform) for transform in transforms}
    parts, weight = alternate(transforms, parts, weight, rounded, seen)
    quantized.load_parts(parts)
    return weight


def choose(candidates: Iterable[Candidate], error: Callable[[Candidate], float], worth: float = 1.0) -> Candidate:
    """The first candidate, or of those whose error is below `worth` of the first one's that of the least."""
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
    """Inputs and what the float layer makes of them, the outputs in float32."""
    return [(x, layer(x).float()) for x in sample]


def output_error(
    layer: nn.Linear | nn.Conv2d,
    step: LayerPlan,
    quantized: QuantLinear | QuantConv2d,
    weight: Tensor,
    sample: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Squared error of the output with the nearest codes of `weight`, the transformed weight, over a sample of inputs.

    The sample has the exact outputs with the inputs. The error of every row of an input counts over the square of its
    output, so that no timestep, and no branch of the guidance, weighs more for its size. Transforms and their parts are
    those of `quantized`; scales are those of least weight error.
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
