"""Choose the backbone calls of the calibration prompts to keep: timestep samplers, and held-out samples.

Every sampler has one signature: the steps to draw from, how many to draw (at most all of them), a random generator
that belongs to one prompt, and the weight of every step of the schedule or None. It returns steps in order.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dmquant.errors import UsageError, unknown

HELD_OUT_STEPS = 8  # one whole step of so many is held out

Sampler = Callable[[Sequence[int], int, random.Random, Sequence[float] | None], list[int]]


@dataclass(frozen=True)
class Sample:
    """A call of the backbone that is kept, for one prompt."""

    prompt: int
    """Index into the calibration prompts."""
    step: int
    """Index of the backbone call within one pipeline call; 0 is the noisiest."""
    held_out: bool
    """Whether the sample is kept out of learning, to compare roundings on."""


def uniform(steps: Sequence[int], count: int, generator: random.Random, weights: Sequence[float] | None) -> list[int]:
    """The same evenly spaced steps for every prompt: the middles of `count` equal parts of the schedule."""
    return [steps[(2 * part + 1) * len(steps) // (2 * count)] for part in range(count)]


def stratified(
    steps: Sequence[int], count: int, generator: random.Random, weights: Sequence[float] | None
) -> list[int]:
    """Stratified sampling: a random step from each of `count` equal parts of the schedule."""
    edges = [part * len(steps) // count for part in range(count + 1)]
    drawn = (low + int(generator.random() * (high - low)) for low, high in itertools.pairwise(edges))
    return [steps[position] for position in drawn]


def importance(
    steps: Sequence[int], count: int, generator: random.Random, weights: Sequence[float] | None
) -> list[int]:
    """Weighted sampling without replacement: Efraimidis and Spirakis (2006), algorithm A.

    The `count` smallest of exponential variables with the weights as rates. Raises UsageError without weights.
    """
    if weights is None:
        raise UsageError("importance sampling needs the weight of every step; measure_importance finds it")
    arrival = {step: _arrival(generator.expovariate(1.0), weights[step]) for step in steps}
    return sorted(sorted(steps, key=arrival.get)[:count])


SAMPLERS: dict[str, Sampler] = {"uniform": uniform, "stratified": stratified, "importance": importance}


@dataclass(frozen=True)
class Sampling:
    """Settings of drawing samples. Raises UsageError for values that make no sense."""

    sampler: str
    """Name of one of SAMPLERS."""
    steps_per_prompt: int
    """Steps kept of a prompt that is learned from; all of them where the schedule has no more."""
    held_out: float
    """Fraction of the prompts that is kept out of learning; at least one prompt is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown("timestep sampler", self.sampler, SAMPLERS, f"it is one of {', '.join(SAMPLERS)}")
        if self.steps_per_prompt < 1:
            raise UsageError(f"{self.steps_per_prompt} steps a prompt asked for: calibration needs at least 1")
        if not 0 < self.held_out < 1:
            raise UsageError(f"a held-out fraction of {self.held_out} makes no sense: it lies between 0 and 1")


def choose(
    sampling: Sampling,
    prompts: int,
    steps: int,
    weights: Sequence[float] | None = None,
    timesteps: Sequence[float] = (),
) -> list[Sample]:
    """The samples of `prompts` prompts on a schedule of `steps` backbone calls, in the order of prompts and steps.

    Held-out samples share neither prompt nor step with those that are learned from, wherever the schedule has 8 steps
    or more; on a shorter one they share steps. Nor do they share timesteps, which some schedulers have for two steps.

    Args:
        weights: importance of every step, not negative; only the `importance` sampler reads them.
        timesteps: the timestep of every step, where two may have the same.
    """
    held_out = held_out_prompts(sampling, prompts)
    apart = held_out_steps(steps)
    unseen = {timesteps[step] for step in apart} if timesteps else set()
    shared = [step for step in range(steps) if step not in apart and not (timesteps and timesteps[step] in unseen)]
    count = min(sampling.steps_per_prompt, len(shared))
    samples = []
    for prompt in range(prompts):
        if apart and prompt in held_out:
            kept = apart
        else:
            generator = random.Random(f"{sampling.seed}, prompt {prompt}")
            kept = SAMPLERS[sampling.sampler](shared, count, generator, weights)
        samples += [Sample(prompt, step, prompt in held_out) for step in kept]
    return samples


def held_out_prompts(sampling: Sampling, prompts: int) -> set[int]:
    """The prompts that are kept out of learning: the fraction asked for, at least one and not all."""
    if prompts < 2:
        raise UsageError(f"calibration needs at least 2 prompts, one of them to choose by; it was given {prompts}")
    generator = random.Random(sampling.seed)
    order = sorted(range(prompts), key=lambda prompt: generator.random())
    return set(order[: min(max(1, round(sampling.held_out * prompts)), prompts - 1)])


def held_out_steps(steps: int) -> list[int]:
    """The held-out steps: one of 8 of a schedule, spread over it, never the first or the last; none below 8 steps."""
    count = steps // HELD_OUT_STEPS
    return [round(part * (steps - 1) / (count + 1)) for part in range(1, count + 1)]


def _arrival(at_unit_rate: float, rate: float) -> float:
    return at_unit_rate / rate if rate > 0 else math.inf
