"""Commands killed at random moments, and at every change of files, and done again until they end."""

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.faults.child import dmquant
from tests.faults.given import COMMANDS, environment, finished, once
from tests.faults.likeness import contents, differences
from tests.faults.points import AFTER, BEFORE, WITHIN, Points
from tests.faults.trials import Trial, Verdict

SECOND_KILL = 0.35  # share of trials in which the command that resumes is killed, too


def kills(scratch: Path, commands: Sequence[str], runs: int, seed: int) -> list[Trial]:
    """`runs` trials of each command, SIGKILLed at random moments of its work."""
    trials = []
    for name in commands:
        expected, (said,) = finished(scratch, name).contents, finished(scratch, name).said
        for index in range(runs):

            def do(folder: Path, name=name, said=said, expected=expected, index=index) -> Verdict:
                drawn = random.Random(f"{seed} {name} {index}")
                kills = _kill(name, folder, scratch, drawn.uniform(0, said.seconds))
                if drawn.random() < SECOND_KILL:
                    moment = drawn.uniform(0, said.seconds)
                    kills += dmquant(COMMANDS[name], folder, environment(scratch), kill_after=moment).killed
                return resumed(name, folder, scratch, expected, f"{kills} kills")

            trials.append(Trial(len(trials), f"kill {name}", do))
    return trials


def _kill(name: str, folder: Path, scratch: Path, moment: float) -> int:
    """Kill a command `moment` seconds after it began, or sooner where it has ended by then; returns the kills."""
    while not (killed := dmquant(COMMANDS[name], folder, environment(scratch), kill_after=moment).killed):
        shutil.rmtree(folder)
        folder.mkdir()
        moment /= 2
    return int(killed)


def write_points(scratch: Path, commands: Sequence[str], points: int, seed: int) -> list[Trial]:
    """`points` trials of each command, SIGKILLed right before, right after or within a change of files."""
    trials = []
    for name in commands:
        expected = finished(scratch, name).contents
        for at, when, what in chosen(listed_points(scratch, name), points, random.Random(f"{seed} {name}")):

            def do(folder: Path, name=name, expected=expected, at=at, when=when, what=what) -> Verdict:
                killed = dmquant(COMMANDS[name], folder, environment(scratch), Points(folder, at, when))
                if not killed.killed:
                    return Verdict("not killed", (f"{when} {what}: {killed.err}",))
                verdict = resumed(name, folder, scratch, expected, "1 kills")
                return Verdict(verdict.word, tuple(f"{when} {what}: {line}" for line in verdict.wrong))

            trials.append(Trial(len(trials), f"write points, {name}", do))
    return trials


@once
def listed_points(scratch: Path, name: str) -> list[str]:
    """What an undisturbed command changes, in order: "open out/state.json" and the like."""
    folder, listed = scratch / f"listed-{name}", scratch / f"points-{name}.txt"
    shutil.rmtree(folder, ignore_errors=True)
    listed.unlink(missing_ok=True)
    folder.mkdir()
    said = dmquant(COMMANDS[name], folder, environment(scratch), Points(folder, listed=listed))
    if said.code:
        raise RuntimeError(said.err)
    return listed.read_text("utf-8").splitlines()


def chosen(points: Sequence[str], count: int, drawn: random.Random) -> list[tuple[int, str, str]]:
    """Number, moment and name of `count` points: every change of every file first, repeated ones after."""
    points = [re.sub(r"\.\d{3,}(?=\.)", ".PID", what) for what in points]
    every = [(at, when, what) for at, what in enumerate(points) for when in (BEFORE, AFTER, WITHIN)]
    drawn.shuffle(every)
    first = {(when, what): (at, when, what) for at, when, what in reversed(every)}
    others = [one for one in every if first[one[1:]] != one]
    return sorted([*first.values(), *others][:count])


def resumed(name: str, folder: Path, scratch: Path, expected: dict[str, str], word: str) -> Verdict:
    """Whether the command, given once more, ends with what an undisturbed one leaves."""
    said = dmquant(COMMANDS[name], folder, environment(scratch))
    if said.code:
        return Verdict("does not resume", (f"exit status {said.code}", *said.err.splitlines()[-5:]))
    unlike = differences(expected, contents(folder))
    return Verdict("not the same", tuple(unlike)) if unlike else Verdict(word)
