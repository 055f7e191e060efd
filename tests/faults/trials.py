"""Trials side by side: how far they are, which failed and how to repeat it, and a table at the end."""

import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HELD = "held"
LINES_SHOWN = 12  # of what is wrong with one trial


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial in a word or two, and what is wrong; none of that where dmquant held."""

    word: str = HELD
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A trial of one `kind` (a row of the table), which works in a folder of its own."""

    number: int
    kind: str
    do: Callable[[Path], Verdict]


@dataclass(frozen=True)
class Mode:
    """How trials are run: how many at once, where, by which command a single one is repeated, whether any is kept."""

    jobs: int
    scratch: Path
    repeat: str
    say: Callable[[str], None] = print


def perform(trials: Sequence[Trial], mode: Mode) -> int:
    """Do all trials; prints progress, failures and a table, and returns the number of failures.

    The folder of a trial that failed stays, and is named.
    """
    if not trials:
        mode.say("no such trial")
        return 1
    found: dict[int, tuple[Trial, Verdict]] = {}
    began, told = time.monotonic(), 0.0
    for trial, verdict in _verdicts(trials, mode):
        found[trial.number] = trial, verdict
        if verdict.wrong:
            mode.say(f"FAILED {trial.kind}, number {trial.number}: {verdict.word}")
            for line in verdict.wrong[:LINES_SHOWN]:
                mode.say(f"    {line[:300]}")
            mode.say(f"    in {mode.scratch / str(trial.number)}; again: {mode.repeat} --only {trial.number}")
        now = time.monotonic()
        if now - told > 10 or len(found) == len(trials):
            failed, left = sum(bool(verdict.wrong) for _, verdict in found.values()), len(trials) - len(found)
            to_go = (now - began) / len(found) * left
            mode.say(f"{len(found)} of {len(trials)}, {failed} failed, {now - began:.0f} s, about {to_go:.0f} s to go")
            told = now
    for line in table(found.values()):
        mode.say(line)
    return sum(bool(verdict.wrong) for _, verdict in found.values())


def table(found: Collection[tuple[Trial, Verdict]]) -> list[str]:
    """Lines of a table: for each kind of trial the number of trials, and of each outcome."""
    words = sorted({verdict.word for _, verdict in found}, key=lambda word: (word != HELD, word))
    rows = [("kind", "trials", *words, "failed")]
    for kind in dict.fromkeys(trial.kind for trial, _ in sorted(found, key=lambda one: one[0].number)):
        verdicts = [verdict for trial, verdict in found if trial.kind == kind]
        counts = Counter(verdict.word for verdict in verdicts)
        failed = sum(bool(verdict.wrong) for verdict in verdicts)
        rows.append((kind, str(len(verdicts)), *(str(counts[word] or "") for word in words), str(failed)))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _verdicts(trials: Sequence[Trial], mode: Mode) -> Iterator[tuple[Trial, Verdict]]:
    stopped = threading.Event()

    def do(trial: Trial) -> tuple[Trial, Verdict] | None:
        if stopped.is_set():
            return None
        folder = mode.scratch / str(trial.number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            verdict = trial.do(folder)
        except Exception:
            verdict = Verdict("the trial itself failed", tuple(traceback.format_exc().splitlines()[-LINES_SHOWN:]))
        if not verdict.wrong:
            shutil.rmtree(folder, ignore_errors=True)
        return trial, verdict

    with ThreadPoolExecutor(mode.jobs) as pool:
        futures = [pool.submit(do, trial) for trial in trials]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            stopped.set()
            raise
