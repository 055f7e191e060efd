"""Cases by the hundred in processes side by side: their number and outcome by kind, and a line a kind of failure."""

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import dmquant.configs
from tests.faults.fuzz.batch import SECONDS, batch, show
from tests.faults.fuzz.targets import TARGETS, prepare
from tests.faults.given import finished
from tests.faults.trials import aligned
from tests.forked import started

BATCH = 250
WORDS = ("accepted", "refused", "other exception", "no good line", "hang", "memory", "the process died")
HELD = WORDS[:2]
SHOWN = 60  # kinds of failures


def fuzz(scratch: Path, kinds: Sequence[str], cases: int, seed: int, only: Sequence[int] | None, jobs: int) -> int:
    """Do `cases` cases, shared out to the kinds; prints failures and a table. Returns the number of failures."""
    given = scratch / "damaged"
    if not given.exists():
        given.mkdir()
        prepare(given, finished(scratch, "run").folder, Path(next(iter(dmquant.configs.__path__))) / "recipes")
    if only is not None:
        (scratch / "one").mkdir(exist_ok=True)
        return sum(show(kind, seed, number, scratch / "one", given) for kind in kinds for number in only)
    batches = _shared_out(kinds, cases)
    found: dict[str, Counter] = defaultdict(Counter)
    failures: dict[tuple, list[dict]] = defaultdict(list)
    began = told = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_batch, scratch, given, index, *one, seed) for index, one in enumerate(batches)]
        for future in as_completed(futures):
            kind, outcomes, seconds = future.result()
            found[kind]["seconds"] += seconds
            for one in outcomes:
                found[kind][one["word"]] += 1
                if one["word"] not in HELD:
                    failures[kind, one["word"], one["where"]].append(one)
            if (now := time.monotonic()) - told > 10:
                told, done = now, sum(counts[word] for counts in found.values() for word in WORDS)
                to_go = (now - began) * (cases / done - 1)
                failed = sum(map(len, failures.values()))
                print(f"{done} cases, {failed} failed, {now - began:.0f} s, about {to_go:.0f} s to go", flush=True)
    _tell(failures, seed)
    rows = [("kind", "cases", *WORDS, "ms a case")]
    for kind in kinds:
        numbers = [found[kind][word] for word in WORDS]
        speed = f"{1000 * found[kind]['seconds'] / sum(numbers):.0f}"
        rows.append((kind, str(sum(numbers)), *(str(number or "") for number in numbers), speed))
    print("\n".join(aligned(rows)))
    return sum(map(len, failures.values()))


def _shared_out(kinds: Sequence[str], cases: int) -> list[tuple[str, list[int]]]:
    """Kinds with the numbers of their cases, by the hundred."""
    total, batches = sum(TARGETS[kind].weight for kind in kinds), []
    for kind in kinds:
        numbers = range(max(1, cases * TARGETS[kind].weight // total))
        batches += [(kind, list(numbers[start : start + BATCH])) for start in numbers[::BATCH]]
    return batches


def _tell(failures: dict[tuple, list[dict]], seed: int) -> None:
    most_first = sorted(failures.items(), key=lambda item: -len(item[1]))
    for (kind, word, where), cases in most_first[:SHOWN]:
        again = f"python -m tests.faults fuzz --kind {kind} --seed {seed} --only {cases[0]['number']}"
        print(f"{len(cases)} x {kind}, {word}: {cases[0].get('what', '')}\n    at {where}; again: {again}")
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} kinds of failures more")


def _batch(scratch: Path, given: Path, index: int, kind: str, numbers: list[int], seed: int) -> tuple[str, list, float]:
    """Do a batch, in as many processes as die of it."""
    folder, lines = scratch / f"batch-{index}", scratch / f"batch-{index}.jsonl"
    lines.unlink(missing_ok=True)
    outcomes, left, began = [], numbers, time.monotonic()
    while left:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        process = started(batch, kind, seed, left, str(folder), str(given), str(lines))
        stuck = _wait(process, lines)
        said = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
        lines.unlink(missing_ok=True)
        outcomes += [one for one in said if "word" in one]
        if not said or "word" in said[-1]:
            if process.exitcode and not said:
                raise RuntimeError(f"a batch of {kind} does not begin: exit status {process.exitcode}")
            break
        number = said[-1]["began"]
        what = "hang" if stuck else "the process died"
        where = "outside Python" if stuck else f"exit status {process.exitcode}"
        outcomes.append({"number": number, "word": what, "what": what, "where": where})
        left = left[left.index(number) + 1 :]
    shutil.rmtree(folder, ignore_errors=True)
    return kind, outcomes, time.monotonic() - began


def _wait(process, lines: Path) -> bool:
    """Wait for a process to end; one that does nothing for too long is killed, and True returned."""
    while process.exitcode is None:
        process.join(0.5)
        quiet = time.time() - os.stat(lines).st_mtime if lines.exists() else 0
        if process.exitcode is None and quiet > 3 * SECONDS:
            process.kill()
            process.join()
            return True
    return False
