"""Single bits flipped in the files of a finished run: noticed and remade, or refused in one line, never used."""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.child import dmquant
from tests.faults.given import COMMANDS, environment, finished, once
from tests.faults.likeness import UNLIKE, contents, differences
from tests.faults.trials import Trial, Verdict

RUN = tuple(COMMANDS["run"])
OTHER_WEIGHTS = (*RUN, "--w", "fp6")
REPORT = ("report", "out")
VERIFY = ["inspect", "out/model", "--verify"]
GENERATE = ["generate", "out/model", *COMMANDS["run"][COMMANDS["run"].index("--prompts") :][:10], "--out", "images"]


@dataclass(frozen=True)
class Victims:
    """Files of a finished run, what is removed before, and the commands, one by one, that then use those files."""

    kind: str
    files: tuple[str, ...]
    then: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()


VICTIMS = (
    Victims("any file", ("**/*",), (RUN,)),
    Victims("images and what lies beside them", ("images/**/*",), (RUN,)),
    Victims("records", ("state.json", "scores.csv", "run.yaml"), (RUN,)),
    Victims("records, then report", ("state.json", "scores.csv", "run.yaml", "images/**/*"), (REPORT, RUN)),
    Victims("probe", ("probe/*",), (OTHER_WEIGHTS,)),
    Victims("calibration", ("calibration/**/*",), (RUN,), ("model",)),
    Victims("calibration data", ("calibration/data/**/*",), (RUN,), ("model", "calibration/codes-*")),
)
"""With `removed`, paths of the run that are removed before, so that what is flipped is needed."""

TELL = {f"out/{name}" for name in ("state.json", "report.json", "report.md", "report.html", "model/README.md")}
"""Files that tell what only state.json knew: how long the images took, and in how much memory."""


def flips(scratch: Path, commands: Sequence[str], runs: int, seed: int) -> list[Trial]:
    """`runs` flipped bits of each kind of file, and of a saved model, which `inspect --verify` is to notice."""
    trials = []
    for victims in VICTIMS:
        for index in range(runs):

            def do(folder: Path, victims=victims, index=index) -> Verdict:
                return _flipped(scratch, folder, victims, random.Random(f"{seed} {victims.kind} {index}"))

            trials.append(Trial(len(trials), victims.kind, do))
    for index in range(runs):

        def verify(folder: Path, index=index) -> Verdict:
            return _verified(scratch, folder, random.Random(f"{seed} model {index}"))

        trials.append(Trial(len(trials), "model, then inspect --verify and generate", verify))
    return trials


@once
def _undisturbed(scratch: Path, victims: Victims) -> dict[str, str]:
    """What the commands leave where no bit is flipped."""
    folder = scratch / f"flipped-{VICTIMS.index(victims)}"
    _prepared(scratch, folder, victims)
    for command in victims.then:
        said = dmquant(command, folder, environment(scratch))
        if said.code:
            raise RuntimeError(f"undisturbed, {command} says {said.err}")
    return contents(folder)


def _prepared(scratch: Path, folder: Path, victims: Victims) -> list[Path]:
    """A copy of the finished run in `folder`, less what is removed; the files that may be flipped."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished(scratch, "run").folder, folder)
    out = folder / "out"
    for pattern in victims.removed:
        for path in out.glob(pattern):
            shutil.rmtree(path)
    files = {path for pattern in victims.files for path in out.glob(pattern)}
    return sorted(path for path in files if path.is_file() and path.stat().st_size and path.name not in UNLIKE)


def flip(path: Path, drawn: random.Random) -> str:
    """Flip a bit of a file: any, or as often one of its last or first bytes or of a digit; says which."""
    data = bytearray(path.read_bytes())
    digits = [index for index, byte in enumerate(data[: 1 << 16]) if 48 <= byte <= 57]
    places = [drawn.randrange(len(data)), drawn.randrange(min(64, len(data)))]
    at, bit = drawn.choice([*places, drawn.choice(digits)] if digits else places), drawn.randrange(8)
    if at in digits and drawn.random() < 0.5:
        bit = 0  # another digit
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at}"


def _flipped(scratch: Path, folder: Path, victims: Victims, drawn: random.Random) -> Verdict:
    victim = drawn.choice(_prepared(scratch, folder, victims))
    name = victim.relative_to(folder)
    what = f"{flip(victim, drawn)} of {name}"
    flipped = hashlib.sha256(victim.read_bytes()).hexdigest()
    for command in victims.then:
        said = dmquant(command, folder, environment(scratch))
        if said.code:
            wrong = said.unlike_a_refusal()
            return Verdict("no good refusal" if wrong else "refused", tuple(f"{what}: {one}" for one in wrong))
    aside = victim.with_name(f"{victim.name}.replaced")
    if aside.exists() and hashlib.sha256(aside.read_bytes()).hexdigest() == flipped:
        aside.unlink()
    unlike = differences(_undisturbed(scratch, victims), contents(folder))
    if victim.name == "state.json" and {one.rpartition(" ")[2] for one in unlike} <= TELL and _tells_no_zero(folder):
        return Verdict("facts gone, and told" if unlike else "as undisturbed")
    return Verdict("not noticed", tuple(f"{what}: {one}" for one in unlike)) if unlike else Verdict("as undisturbed")


def _tells_no_zero(folder: Path) -> bool:
    """Whether a report without the times, the memory and the number of black images says that these are not known."""
    report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    (recipe,) = report["recipes"].values()
    seconds = [*report["reference"]["seconds"].values(), *recipe["seconds"].values()]
    return all(seconds) and recipe["settings"]["images with NaN or infinity"] == "not recorded"


def _verified(scratch: Path, folder: Path, drawn: random.Random) -> Verdict:
    victim = drawn.choice(_prepared(scratch, folder, Victims("", ("model/**/*",), ())))
    what = f"{flip(victim, drawn)} of {victim.relative_to(folder)}"
    loaded = victim.name != "README.md"
    for command in (VERIFY, GENERATE) if loaded else (VERIFY,):
        said = dmquant(command, folder, environment(scratch))
        if wrong := said.unlike_a_refusal() if said.code else ["not noticed"]:
            return Verdict(f"{command[0]}: not refused", tuple(f"{what}: {one}" for one in wrong))
    return Verdict("noticed")
