"""The loop of a recovery: mini-batches of the sampler's states, steps, held-out checks, and the best that was seen."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.blocks.learn import spread_batch
from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.student import Student, facts_of, load_facts
from dmquant.calib.whole.teacher import Teacher
from dmquant.errors import UserError
from dmquant.host.sealed import load_sealed, save_sealed

STATE = "tuning.safetensors"
REPORT_EVERY = 10  # steps
DIVERGED = 10  # times the error at the beginning
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Tuning:
    """Settings of a recovery."""

    train: tuple[str, ...]
    lean: Lean | None = None
    """Q-GaLore for weights; None for AdamW."""
    steps: int = 1000
    batch_size: int = 16
    rate: float = 1.0
    """Factor of all rates."""
    checks: int = 10
    seed: int = 0


@dataclass
class Tuned:
    """How a recovery went. Errors are the teacher's, on held-out samples."""

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
    teacher: Teacher,
    learning: Sequence[int],
    held_out: Sequence[int],
    options: Tuning,
    *,
    folder: Path,
    key: str,
    bar: Callable[..., None] = lambda done, total, what: None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Let the student learn the teacher's predictions; at the end it has the values of least held-out error.

    The loss is the teacher's error on a mini-batch drawn from all over the schedule, over that on held-out samples at
    the beginning; rates fall to zero with a cosine. After each of `options.checks` checks the state is in `folder`,
    under the hash `key` of all that it depends on: a command that was killed continues there, to the same bytes.
    A loss, gradient or check that is not finite, or an error DIVERGED times that of the beginning, ends it; what it had
    best until then stays. Raises UserError where the error is not finite to begin with.
    """
    path, batch_size = folder / STATE, options.batch_size
    with student.learning():
        student.set_rates(0.0)
        best, done = student.snapshot(), 0
        if (found := _load(path, key, student)) is not None:
            best, done, ended = found
        else:
            before = _held_out_error(teacher, held_out, batch_size)
            if not math.isfinite(before):
                raise UserError("the quantized model predicts NaN or infinity on held-out samples: tuning cannot begin")
            ended = Tuned(before, before, 0)
        if done:
            say(f"tuning: continues after step {done} of {options.steps}")
        for step in range(done + 1, options.steps + 1):
            if ended.diverged:
                break
            student.set_rates(options.rate * (1 + math.cos(math.pi * (step - 1) / options.steps)) / 2)
            batch = spread_batch(learning, batch_size, torch.Generator().manual_seed(options.seed + (step << 20)))
            loss = teacher.error(batch) / max(ended.error_before, _TINY)
            loss.backward()
            if step % REPORT_EVERY == 0 or step == options.steps:
                lately = f", {ended.errors[-1] / ended.error_before:.3f} on others" if ended.errors else ""
                bar(step, options.steps, f"tuning: {loss.item():.3f} of the error at first{lately}")
            is_check = step * options.checks // options.steps > (step - 1) * options.checks // options.steps
            if not math.isfinite(loss.item()) or student.broken:
                ended.diverged = f"at step {step} the loss or a gradient was NaN or infinity"
            elif is_check:
                error = _held_out_error(teacher, held_out, batch_size)
                ended.errors.append(error)
                if error < ended.error:
                    best, ended.error, ended.best_step = student.snapshot(), error, step
                if not error < DIVERGED * ended.error_before:
                    ended.diverged = f"after step {step} the error is {error / ended.error_before:.0f} times the first"
            if is_check or ended.diverged:
                _save(path, key, student, best, step, ended)
        student.restore(best)
    return ended


def rehearse(student: Student, teacher: Teacher, samples: Sequence[int], options: Tuning) -> float:
    """Seconds of one step, which is computed and changes nothing."""
    student.set_rates(0.0)
    with student.learning():
        for _ in range(2):  # the first also computes subspaces, and allocates
            began = time.perf_counter()
            teacher.error(list(samples[: options.batch_size])).backward()
            seconds = time.perf_counter() - began
    student.forget()
    return seconds


def _held_out_error(teacher: Teacher, held_out: Sequence[int], batch_size: int) -> float:
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out), batch_size):
            batch = held_out[start : start + batch_size]
            total += teacher.error(batch).item() * len(batch)
    return total / len(held_out)


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
