"""Files of users in every place that a command may write to: whatever it does, their content is there afterwards."""

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.faults.child import dmquant
from tests.faults.given import CALIBRATION, COMMANDS, IMAGES, MODEL, OUT, environment, once, undisturbed
from tests.faults.trials import Trial, Verdict

QUANTIZE = ["quantize", MODEL, "--recipe", "../given/small.yaml", *CALIBRATION, "--height", "32", "--width", "32"]
GENERATE = ["generate", MODEL, *IMAGES]
AGAIN = {
    **{f"{name} --overwrite": [*command, "--overwrite"] for name, command in COMMANDS.items()},
    **{name: command for name, command in COMMANDS.items() if name != "sweep"},
    "run, other model": ["run", "../given/other", *COMMANDS["run"][2:], "--overwrite"],
    "quantize": [*QUANTIZE, *OUT],
    "quantize --overwrite": [*QUANTIZE, *OUT, "--overwrite"],
    "quantize in place": ["quantize", "out", "--recipe", "rtn", *OUT, "--overwrite"],
    "quantize with its data": [*QUANTIZE, *OUT, "--calibration-data", "out.calibration", "--overwrite"],
    "generate": [*GENERATE, *OUT],
    "generate one": [*GENERATE, "--num-prompts", "1", "--seed", "5", *OUT],
    "generate --overwrite": [*GENERATE, "--num-prompts", "2", "--seed", "5", *OUT, "--overwrite"],
    "score": ["score", "out/images/fp", "out/images/quantized", "--metrics", "psnr", "--csv", "out/scores.csv"],
    "grid": ["grid", "out/images/fp", "out/images/quantized", "--out", "out/grid.png"],
    "report": ["report", "out"],
}
BEFORE = {
    "nothing": (),
    "run": (COMMANDS["run"],),
    "compare": (COMMANDS["compare"],),
    "quantize": ([*QUANTIZE, *OUT],),
    "generate": ([*GENERATE, *OUT],),
}
PLACES = (
    *(
        "out/run.yaml",
        "out/state.json",
        "out/scores.csv",
        "out/report.html",
        "out/report.md",
        "out/grid.png",
        "out/log.txt",
    ),
    *(
        "out/notes.txt",
        "out/model/net.py",
        "out/model/README.md",
        "out/model/.git/config",
        "out/model/model_index.json",
    ),
    *("out/model/transformer/config.json", "out/model/transformer/notes.txt", "out/model.part/mine", "out/README.md"),
    *(
        "out/images/fp/00000.png",
        "out/images/fp/holiday.png",
        "out/images/quantized/00001.png",
        "out/images/mine/00000.png",
    ),
    *("out/images/fp/00000.latent.safetensors", "out/00000.png", "out/00001.png", "out/00000.latent.safetensors"),
    *(
        "out/calibration/mine",
        "out/calibration/data/mine/index.json",
        "out/recipes/small/mine",
        "out/recipes/mine/model/x",
    ),
    *(
        "out/recipes/rtn-fp4/model/x",
        "out/trials/mine.json",
        "out/probe/fp.safetensors",
        "out/features/mine",
        "out/.git/HEAD",
    ),
    *(
        "out/.dmquant/mine",
        "out/.dmquant/README",
        "out/.dmquant/lock",
        "out/.lock",
        "out/state.journal",
        "out/shared/mine",
        "out/vae/mine",
    ),
    *(
        "out.calibration/chapter",
        "out.part/chapter",
        "out.replaced/chapter",
        ".out.dmquant/chapter",
        "out.calibration/index.json",
    ),
)
LINKED = ("out", "out/images", "out/images/fp", "out/model", "out/calibration", "out/model/transformer")


def overwrites(scratch: Path, commands: Sequence[str], runs: int, seed: int) -> list[Trial]:
    """`runs` trials of each command, in folders that hold what another left and files of users anywhere."""
    other = scratch / "given" / "other"
    if not other.exists():
        shutil.copytree(scratch / "given" / "model", other)
    trials = []
    for name, command in AGAIN.items():
        for index in range(runs):

            def do(folder: Path, name=name, command=command, index=index) -> Verdict:
                return _tried(scratch, folder, command, random.Random(f"{seed} {name} {index}"))

            trials.append(Trial(len(trials), name, do))
    return trials


def _tried(scratch: Path, folder: Path, command: list[str], drawn: random.Random) -> Verdict:
    alike = command[0] if command[0] in BEFORE else "run"
    before = alike if drawn.random() < 0.5 else drawn.choice(list(BEFORE))
    shutil.rmtree(folder)
    shutil.copytree(_left(scratch, before), folder, symlinks=True)
    theirs = {_put(folder, place, drawn): place for place in drawn.sample(PLACES, drawn.choice((1, 3, 8)))}
    if drawn.random() < 0.2:
        place = drawn.choice(LINKED)
        theirs |= dict.fromkeys(_link(folder, place), f"behind a link from {place}")
    theirs.pop("", None)
    said = dmquant(command, folder, environment(scratch))
    kept = _contents(folder)
    lost = sorted(place for digest, place in theirs.items() if digest not in kept)
    wrong = [f"lost: {place}, after {before}, exit status {said.code}" for place in lost]
    if said.code and not lost:
        wrong = [f"after {before}, with {sorted(theirs.values())}: {one}" for one in said.unlike_a_refusal()]
    return Verdict("refused" if said.code else "done", tuple(wrong))


@once
def _left(scratch: Path, before: str) -> Path:
    """The folder that one of BEFORE leaves."""
    return undisturbed(scratch / f"before-{before}", *BEFORE[before]).folder


def _put(folder: Path, place: str, drawn: random.Random) -> str:
    """Write a file of the user's, a picture if its name says so; its hash, "" where the place is under a file."""
    path = folder / place
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return ""
    if path.suffix == ".png":
        Image.new("RGB", (8, 8), tuple(drawn.randbytes(3))).save(path)
    else:
        path.write_text(f"a user's, {drawn.random()}\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _link(folder: Path, place: str) -> set[str]:
    """Move what is at a place away, with a picture and a text of the user's, and link it; hashes of what is there."""
    away, link = folder / "elsewhere", folder / place
    if link.exists():
        link.rename(away)
    away.mkdir(exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    (away / "theirs.txt").write_text("a user's, behind a link\n")
    os.symlink(away, link)
    return {hashlib.sha256((away / "theirs.txt").read_bytes()).hexdigest()}


def _contents(folder: Path) -> set[str]:
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
