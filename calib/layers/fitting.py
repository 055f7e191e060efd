"""Fit the transforms of a layer to its data: before its scales are, and to what rounding left wrong, after it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from dmquant.activations import TimestepRanges
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import Moments, fit_grid
from dmquant.calib.layers.ranges import nearest_seen
from dmquant.convert import LayerPlan
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.qtensor import to_matrix
from dmquant.rounding import gptq, nearest
from dmquant.transforms import InputStatistics, Residuals, Transform, alternate, chains

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

    def best(transforms: tuple[Transform, ...]) -> tuple:
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
    if not any(transform.turns() for transform in transforms):
        return weight
    nearest_plan = replace(step, weights=replace(step.weights, scale="mse"), candidates=())
    weighed = moments is not None and moments.in_full and any(one.weighs_by_moments(one.options) for one in transforms)
    factors = gptq.factorize(moments.blocks(), options) if weighed else []

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


def _choices(transforms: tuple[Transform, ...]) -> Iterator[tuple[Transform, ...]]:
    """The transforms without any optional one, then with one optional one or more."""
    optional = [transform for transform in transforms if transform.optional()]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            yield tuple(one for one in transforms if not one.optional() or one in chosen)


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


class _Observed:
    """A forward pre-hook on a learning layer: means of its transformed input and of what its output will lack.

    Not a forward hook: a replay ends inside the layer whose output it is run for.
    """

    def __init__(self, learner: Learner, transform: Transform, timesteps: TimestepRanges):
        self.learner, self.count, self.timesteps = learner, transform.ranges(), timesteps
        self.inputs: Tensor | float = 0.0
        self.outputs = torch.zeros(self.count, transform.shape[0], dtype=torch.float64)
        self.rows = torch.zeros(self.count, dtype=torch.int64)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, quantized = args[0].to(layer.weight.dtype), self.learner.quantized
        lacking = type(layer).forward(layer, x).float() - self.learner.forward(x).float()
        of_rows = self.timesteps.of_rows[self.count].cpu() if self.count > 1 else torch.zeros(len(x), dtype=torch.int64)
        magnitude = quantized.transform_input(x).abs().float()
        self.inputs = self.inputs + _row_means(magnitude, quantized.channel_dim, len(of_rows)).sum(0)
        self.outputs.index_add_(0, of_rows, _row_means(lacking, quantized.channel_dim, len(of_rows)))
        self.rows += torch.bincount(of_rows, minlength=self.count)

    def residuals(self, values: Tensor) -> Residuals | None:
        """None where no sample reached the layer; a range without samples takes the means of the nearest that has."""
        if not self.rows.any():
            return None
        means = (self.outputs / self.rows.clamp(min=1).unsqueeze(-1))[nearest_seen(self.rows > 0)]
        grid = self.learner.grid
        lost = grid.as_weight(grid.weight - values)
        inputs = self.inputs / self.rows.sum()
        return Residuals(lost, inputs.float().to(lost.device), means.float().to(lost.device))


def _row_means(x: Tensor, dim: int, rows: int) -> Tensor:
    """Means over the positions of each of the call's rows, (rows, channels), float64."""
    channels_last = x.movedim(dim, -1)
    return channels_last.reshape(rows, -1, channels_last.shape[-1]).mean(1, dtype=torch.float64).cpu()


def correct(
    learners: Sequence[Learner],
    values: dict[str, Tensor],
    error: float,
    timesteps: TimestepRanges,
    run_all: Callable[[], None],
    held_out_error: Callable[[], float],
) -> float:
    """Fit the correcting transforms of a task's layers to its decided `values`; returns the error on held-out samples.

    `run_all` runs the task over all samples to learn from. One method after another, all layers of a method at once;
    if that makes the held-out error worse, each layer alone, and only where it does not.
    """
    pairs = [
        (learner, one) for learner in learners for one in learner.quantized.transforms if one.corrects(one.options)
    ]
    for stage in sorted({transform.STAGE for _, transform in pairs}):
        observed = {
            learner.name: (learner, transform, _Observed(learner, transform, timesteps))
            for learner, transform in pairs
            if stage == transform.STAGE
        }
        handles = [learner.layer.register_forward_pre_hook(hook) for learner, _, hook in observed.values()]
        try:
            for learner in learners:
                learner.values = values[learner.name]
            with torch.no_grad():
                run_all()
        finally:
            for learner in learners:
                learner.values = None
            for handle in handles:
                handle.remove()
        error = _keep_what_helps(observed, values, error, held_out_error)
    return error


def _keep_what_helps(
    observed: dict[str, tuple[Learner, Transform, _Observed]],
    values: dict[str, Tensor],
    error: float,
    held_out_error: Callable[[], float],
) -> float:
    before, after = {}, {}
    for name, (learner, transform, hook) in observed.items():
        if residuals := hook.residuals(values[name]):
            before[name] = {
                transform.name: {part: each.clone() for part, each in learner.quantized.parts(transform).items()}
            }
            after[name] = {transform.name: transform.correct(residuals)}

    def load(name: str, parts: dict[str, dict[str, Tensor]]) -> None:
        observed[name][0].quantized.load_parts(parts)

    for name, parts in after.items():
        load(name, parts)
    together = held_out_error()
    if together <= error:
        return together
    for name, parts in before.items():
        load(name, parts)
    for name, parts in after.items():
        load(name, parts)
        alone = held_out_error()
        if alone <= error:
            error = alone
        else:
            load(name, before[name])
    return error
