"""What every trial works on: a tiny pipeline, its prompts, recipes, and the commands that are broken."""

import functools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dmquant.host.console import quiet_libraries
from tests.faults.child import Said, dmquant
from tests.faults.likeness import contents
from tests.tiny import tiny_pixart

T = TypeVar("T")
PROMPTS = (
    *("red apple", "a blue cat", "the green house, with a tree", "boat", "a face on the boat"),
    "the red boat and the blue tree and the green cat and the apple and the house and the face",  # is cut
)
CALIBRATED = {
    "name": "small",
    "weights": "fp4",
    "activations": "fp6",
    "granularity": "group:16",
    "rounding": {"method": "adaround"},
    "calibration": {"prompts": 4, "steps_per_prompt": 2, "sampler": "importance"},
    "learning": {"iterations": 2, "batch_size": 2},
    "rules": [{"match": ["pos_embed*", "adaln_single*", "caption_projection*", "proj_out"], "keep": True}],
}
MODEL = "../given/model"
IMAGES = ["--prompts", "../given/prompts.txt", "--steps", "2", "--height", "32", "--width", "32", "--batch-size", "4"]
CALIBRATION = ["--calibration-prompts", "../given/prompts.txt"]
METRICS = ["--metrics", "psnr,latent_mse"]
OUT = ["--out", "out"]
COMMANDS = {
    "run": ["run", MODEL, "--recipe", "../given/small.yaml", *CALIBRATION, *IMAGES, *METRICS, *OUT],
    "compare": ["compare", MODEL, "--recipes", "rtn:fp4,../given/small.yaml", *CALIBRATION, *IMAGES, *METRICS, *OUT],
    "sweep": ["sweep", MODEL, "--bits", "4,8", "--formats", "fp4,int8", "--techniques", "rtn", *IMAGES, *METRICS, *OUT],
}


def prepare(scratch: Path) -> None:
    """Make the tiny pipeline, prompts and recipe in `scratch`/given, once."""
    given = scratch / "given"
    if (given / "ready").exists():
        return
    given.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    tiny_pixart(given / "model", blocks=2)
    (given / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (given / "small.yaml").write_text(yaml.safe_dump(CALIBRATED), encoding="utf-8")
    (given / "ready").touch()


def environment(scratch: Path) -> dict[str, str]:
    """The environment of every command: one thread, no network, and a cache that is no user's."""
    fixed = {"DMQUANT_CACHE": str(scratch / "given" / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return dict(os.environ) | fixed | {"COLUMNS": "120", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Undisturbed:
    """What commands leave that nothing disturbs: their folder, its contents as compared, and what each said."""

    folder: Path
    contents: dict[str, str]
    said: list[Said]


def undisturbed(folder: Path, *commands: list[str]) -> Undisturbed:
    """Do commands in a new folder, none of which may fail."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    said = [dmquant(command, folder, environment(folder.parent)) for command in commands]
    for one, command in zip(said, commands, strict=True):
        if one.code:
            raise RuntimeError(f"undisturbed, dmquant {' '.join(command)} ends with {one.code} and says: {one.err}")
    return Undisturbed(folder, contents(folder), said)


def once(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, called once for the same arguments by all the trials at once; the others wait and get what it made."""
    kept, making = functools.cache(make), threading.RLock()

    @functools.wraps(make)
    def made(*arguments: Any) -> T:
        with making:
            return kept(*arguments)

    return made


@once
def finished(scratch: Path, name: str) -> Undisturbed:
    """One of COMMANDS, done once."""
    return undisturbed(scratch / f"undisturbed-{name}", COMMANDS[name])
