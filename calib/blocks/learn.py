"""Learn the roundings of one unit: the loop that every method of dmquant.rounding shares."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.midway import Midway, Reached
from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.data.tree import map_floats
from dmquant.calib.layers.learner import Learner
from dmquant.calib.objectives import Objective
from dmquant.errors import UserError
from dmquant.recipe import Learning
from dmquant.rounding import Rounded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPORT_EVERY = 10  # steps
DIVERGED = 100.0
"""Times the loss of nearest rounding that a loss may become and stay for REPORT_EVERY steps. Were every weight at the
farther of its two values, the error would be 7 times that of nearest rounding, unless inputs make errors add up."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Learned:
    """The end of a unit's learning. Errors are those of the recipe's objective on held-out samples."""

    nearest_error: float
    error: float
    best_step: int
    """Step whose hard roundings were kept; 0 is nearest rounding, or what learning began with."""
    undecided: float
    """Share of the weights that were between two values when the last step ended."""
    solved: bool = False
    """Whether the roundings kept were found by a method without steps."""
    diverged: int | None = None
    """Step at which learning was given up: its loss was NaN or infinite, or had stayed beyond DIVERGED."""


def learn(
    unit: str,
    learners: Sequence[Learner],
    objective: Objective,
    options: Learning,
    report: Callable[[int, float], None],
    midway: Midway | None = None,
) -> tuple[Learned, dict[str, Rounded]]:
    """Learn the roundings of a unit's layers against full precision; returns how it ended and the roundings by layer.

    The values of a rounding are float32 in the shape of its grid's `weight`: the matrix form, (rows, columns).

    The loss is the objective's, by default the mean squared error of the unit's output, over that of nearest rounding,
    plus the roundings' penalties averaged over all weights, so one setting serves units of all sizes. The optimizer and
    the course of its rate are the method's. Mini-batches hold samples from all over the schedule. At `options.checks`
    points the hard roundings are tried on held-out samples; the best of these, of nearest rounding and of what learning
    began with is returned. Roundings without parameters are tried once, as they are. `report(step, loss)` is called now
    and then. Where `midway` has kept the state of this loop, it goes on from there, to the same bits.

    Held learners learn too, without penalty, and are soft in all tries; they end where they were at the best one. The
    roundings returned, and the weights counted, are those of the others.

    Where the loss diverges learning ends, with the best so far. Raises UserError where that of nearest rounding is not
    finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    held = [parameter for learner in learners if learner.held for parameter in learner.rounding.parameters()]
    roundings = [learner.rounding for learner in learners]
    parameters = [parameter for rounding in roundings for parameter in rounding.parameters()]
    learners = [learner for learner in learners if not learner.held]
    kept, kept_soft = {learner.name: Rounded(learner.grid.nearest, learner.grid) for learner in learners}, _copies(held)
    data = objective.data
    nearest_error = least = held_out_error(learners, objective, kept, options)
    if not math.isfinite(nearest_error):
        raise UserError(f"the error of {unit} is {nearest_error}: its activations hold NaN or infinity")
    if not parameters:
        hard = {learner.name: learner.rounding.rounded() for learner in learners}
        if all(torch.equal(hard[name].values, nearest.values) for name, nearest in kept.items()):
            return Learned(nearest_error, nearest_error, 0, 0.0), kept
        error = held_out_error(learners, objective, hard, options)
        solved = error < nearest_error
        return Learned(nearest_error, min(error, nearest_error), 0, 0.0, solved), hard if solved else kept
    solved = False
    for begun, is_solution in _beginnings(learners):
        error = held_out_error(learners, objective, begun, options)
        if error < least:
            kept, least, solved = begun, error, is_solution
    if not options.iterations:
        return Learned(nearest_error, least, 0, 0.0, solved), kept
    weights = sum(learner.grid.weight.numel() for learner in learners)
    method = learners[0].rounding
    optimizer = method.optimizer(parameters, options.learning_rate or method.learning_rate)
    there = midway and midway.load_(learners, optimizer, generator)
    done, kept, least, best_step, solved = there or (0, kept, least, 0, solved)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda more: method.rate((done + more) / options.iterations))
    losses: list[Tensor] = []
    diverged = None
    for step in range(done + 1, options.iterations + 1):
        batch = spread_batch(data.learning, options.batch_size, generator)
        optimizer.zero_grad()
        with data.graph():
            loss = objective.loss(batch, generator, step) / max(nearest_error, _TINY)
            loss.backward()
        for learner in learners:  # one by one: the graph of a penalty is larger than that of the weights
            learner.rounding.add_penalty_gradient_((step - 1) / options.iterations, 1 / weights)
        losses.append(loss.detach())
        if step % REPORT_EVERY == 0 or step == options.iterations:
            recent, losses = torch.stack(losses).tolist(), []
            if not all(map(math.isfinite, recent)) or min(recent) > DIVERGED:
                diverged = step
                break
            report(step, recent[-1])
        optimizer.step()
        rates.step()
        for rounding in roundings:
            rounding.project_()
        if step * options.checks // options.iterations > (step - 1) * options.checks // options.iterations:
            hard = {learner.name: learner.rounding.rounded() for learner in learners}
            error = held_out_error(learners, objective, hard, options)
            if error < least:
                kept, least, best_step, solved = hard, error, step, False
                kept_soft = _copies(held)
        if midway and step % midway.every == 0:
            midway.save(Reached(step, kept, least, best_step, solved), learners, optimizer, generator)
    undecided = sum(learner.rounding.undecided() for learner in learners) / weights
    with torch.no_grad():
        for parameter, value in zip(held, kept_soft, strict=True):
            parameter.copy_(value)
    return Learned(nearest_error, least, best_step, undecided, solved, diverged), kept


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _beginnings(learners: Sequence[Learner]) -> Iterator[tuple[dict[str, Rounded], bool]]:
    """What learning may begin with, and whether it is solved: solutions, and what the window before came to."""
    solutions = {one.name: Rounded(one.grid.solution, one.grid) for one in learners if one.grid.solution is not None}
    begun = {learner.name: learner.rounding.rounded() for learner in learners}
    if solutions:
        yield begun | solutions, True
    if any(learner.goes_on for learner in learners):
        yield begun, False


def spread_batch(samples: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Draw a random sample from each of `size` equal parts of `samples`."""
    draws = torch.rand(size, generator=generator, dtype=torch.float32).tolist()
    return [samples[int((part + draw) * len(samples) / size)] for part, draw in enumerate(draws)]


@contextlib.contextmanager
def learning_layers(learners: Sequence[Learner]) -> Iterator[None]:
    """Let the layers compute by their learners until the block ends."""
    with contextlib.ExitStack() as stack:
        for learner in learners:
            stack.enter_context(replaced_forward(learner.layer, learner.forward))
        yield


def held_out_error(
    learners: Sequence[Learner], objective: Objective, rounded: Mapping[str, Rounded], options: Learning
) -> float:
    """The objective's error of the unit on held-out samples, with these weights."""
    total, held_out = 0.0, objective.data.held_out
    for learner in learners:
        learner.values = rounded[learner.name].values
    with torch.no_grad():
        for start in range(0, len(held_out), options.batch_size):
            batch = held_out[start : start + options.batch_size]
            total += objective.error(batch).item() * len(batch)
    for learner in learners:
        learner.values = None
    return total / len(held_out)


@contextlib.contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let `module` compute in `dtype` and take inputs of any, until the block ends."""
    own = {parameter: parameter.data for parameter in module.parameters() if parameter.is_floating_point()}
    compute = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cast = map_floats(lambda tensor: tensor.to(dtype), [args, kwargs])
        return compute(*cast[0], **cast[1])

    try:
        for parameter, data in own.items():
            parameter.data = data.to(dtype)
        with replaced_forward(module, forward):
            yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
