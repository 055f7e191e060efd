"""The loop of a recovery: batches of runs, steps, held-out checks, and the best that was seen."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.runs import Runs
from dmquant.calib.tuning.student import Student, facts_of, load_facts
from dmquant.errors import UserError
from dmquant.host.sealed import load_sealed, save_sealed

STATE = "tuning.safetensors"
REPORT_EVERY = 10  # steps
DIVERGED = 10  # dB above the error at the beginning


@dataclass(frozen=True)
class Tuning:
    """Settings of a recovery."""

    train: tuple[str, ...]
    lean: Lean | None = None
    """Q-GaLore for weights; None for AdamW."""
    steps: int = 1000
    rate: float = 1.0
    """Factor of all rates."""
    checks: int = 10
    seed: int = 0


@dataclass
class Tuned:
    """How a recovery went. Errors are those of held-out runs, of which the student answers every call, in dB."""

    error_before: float
    error: float
    best_step: int
    """Step whose values were kept; 0 where none was better than what it began with."""
    errors: list[float] = field(default_factory=list)
    """At each check."""
    diverged: str | None = None
    """Why it ended before its last step."""


def tune_(
    student: Student,
    learning: Runs,
    held_out: Runs,
    options: Tuning,
    *,
    folder: Path,
    key: str,
    bar: Callable[..., None] = lambda done, total, what: None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Let the student learn to end where full precision does; at the end it has the values of least held-out error.

    The loss is the error of a batch of runs; all batches come in one order, then in another. Rates fall to zero with a
    cosine. After each of `options.checks` checks the state is in `folder`, under the hash `key` of all that it depends
    on: a command that was killed continues there, to the same bytes.
    A loss, gradient or check that is not finite, or an error DIVERGED above that of the beginning, ends it; what it had
    best until then stays. Raises UserError where the error is not finite to begin with.
    """
    path = folder / STATE
    with student.learning():
        student.set_rates(0.0)
        best, done = student.snapshot(), 0
        if (found := _load(path, key, student)) is not None:
            best, done, ended = found
        else:
            before = _mean_error(held_out)
            if not math.isfinite(before):
                raise UserError("the quantized model ends in NaN or infinity in held-out runs: tuning cannot begin")
            ended = Tuned(before, before, 0)
        if done:
            say(f"tuning: continues after step {done} of {options.steps}")
        for step in range(done + 1, options.steps + 1):
            if ended.diverged:
                break
            student.set_rates(options.rate * (1 + math.cos(math.pi * (step - 1) / options.steps)) / 2)
            loss = learning.error(_batch_of(step - 1, len(learning), options.seed))
            loss.backward()
            student.step()
            if step % REPORT_EVERY == 0 or step == options.steps:
                lately = f", {ended.errors[-1] - ended.error_before:+.2f} dB on others" if ended.errors else ""
                bar(step, options.steps, f"tuning: {loss.item():.2f} dB{lately}")
            is_check = step * options.checks // options.steps > (step - 1) * options.checks // options.steps
            if not math.isfinite(loss.item()) or student.broken:
                ended.diverged = f"at step {step} the loss or a gradient was NaN or infinity"
            elif is_check:
                error = _mean_error(held_out)
                ended.errors.append(error)
                if error < ended.error:
                    best, ended.error, ended.best_step = student.snapshot(), error, step
                if not error < ended.error_before + DIVERGED:
                    ended.diverged = (
                        f"after step {step} the error is {error - ended.error_before:.0f} dB above the first"
                    )
            if is_check or ended.diverged:
                _save(path, key, student, best, step, ended)
        student.restore(best)
    return ended


def rehearse(student: Student, learning: Runs) -> float:
    """Seconds of one step, which is computed and changes nothing."""
    student.set_rates(0.0)
    with student.learning():
        for _ in range(2):  # the first also computes subspaces, and allocates
            began = time.perf_counter()
            learning.error(0).backward()
            student.step()
            seconds = time.perf_counter() - began
    student.forget()
    return seconds


def _batch_of(step: int, batches: int, seed: int) -> int:
    """The batch of a step, both from 0: every epoch takes each once, in an order of its own."""
    epoch, place = divmod(step, batches)
    return int(torch.randperm(batches, generator=torch.Generator().manual_seed(seed + epoch))[place])


def _mean_error(runs: Runs) -> float:
    with torch.no_grad():
        sums = [runs.error(number).item() * len(batch) for number, batch in enumerate(runs.batches)]
    return sum(sums) / sum(map(len, runs.batches))


def _save(path: Path, key: str, student: Student, best: dict[str, dict[str, Tensor]], step: int, ended: Tuned) -> None:
    tensors, facts = facts_of(student.held)
    kept = {f"best|{name}|{part}": tensor for name, of in best.items() for part, tensor in of.items()}
    tensors = {f"now|{name}": tensor for name, tensor in tensors.items()} | kept
    about = {"key": key, "step": step, "facts": facts, "ended": vars(ended)}
    save_sealed(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about)


def _load(path: Path, key: str, student: Student) -> tuple[dict[str, dict[str, Tensor]], int, Tuned] | None:
    """The best values, the step and the course of a recovery that was stopped; None without one of this key."""
    found = load_sealed(path)
    if found is None or found[1]["key"] != key:
        return None
    tensors, about = found
    best: dict[str, dict[str, Any]] = {name: {} for name in student.held}
    for name, tensor in tensors.items():
        if name.startswith("best|"):
            _, held, part = name.split("|")
            best[held][part] = tensor
    now = {name.removeprefix("now|"): tensor for name, tensor in tensors.items() if name.startswith("now|")}
    load_facts(student.held, now, about["facts"])
    return best, about["step"], Tuned(**about["ended"])
