"""A run folder: its content, the lock of its writer, and the record of finished stages.

A run of one recipe holds both sides, full precision and quantized. A comparison holds the full-precision side, and a
run folder for the quantized side of each recipe below `recipes/`.

`state.json` is the memory of a run. A stage is done when its record there carries the fingerprint of exactly the
settings the stage depends on and the files it wrote are still what it wrote, so the same command continues after a
kill, and a changed setting redoes what depends on it and nothing else. Facts that come one by one while a stage runs
are lines added to `state.journal`, which the next record takes into `state.json`.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dmquant.errors import UserError
from dmquant.host import processes
from dmquant.host.files import append_line, write_text

try:
    import fcntl
except ImportError:  # Windows: a run is not protected against a second one in the same folder
    fcntl = None

VERSION = 1
STATE, JOURNAL, SETTINGS, LOG, LOCK = "state.json", "state.journal", "run.yaml", "log.txt", ".lock"
GRID, PLOT = "grid.png", "compare.png"
SCORES, FEATURES, PROBE = "scores.csv", "features", "probe"
LAYERS, CUT_PROMPTS = "layers", "cut_prompts"  # a stage, and a kind of notes
IMAGES, MODEL, PARTIAL_MODEL, CALIBRATION, RECIPES = "images", "model", "model.part", "calibration", "recipes"
TRIALS, SHARED = "trials", "shared"
SWEEP_TABLE, SWEEP_PLOT, SWEEP_PAGE, SWEEP_DATA = "sweep.csv", "sweep.png", "sweep.md", "sweep.json"
REPORTS = ("report.md", "report.html", "report.json")
ENTRIES = (
    *(STATE, JOURNAL, SETTINGS, LOG, LOCK, GRID, PLOT, SCORES, FEATURES, PROBE),
    *(IMAGES, MODEL, PARTIAL_MODEL, CALIBRATION, RECIPES, TRIALS, SHARED),
    *(SWEEP_TABLE, SWEEP_PLOT, SWEEP_PAGE, SWEEP_DATA),
    *REPORTS,
)


YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # run.yaml lists all prompts


def folder_name(name: str) -> str:
    """A recipe's name as any file system takes it."""
    return re.sub(r"[^\w.+-]", "_", name)


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run."""
    return (folder / STATE).is_file()


class RunFolder:
    """The folder of a run; get one with `claim` (to write) or `RunFolder(path)` (to read).

    Where several processes run, each remembers the finished stages, and the main one writes them down.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} holds no run: there is no {STATE} in it") from None
        except ValueError as error:
            raise UserError(f"{path / STATE} is damaged ({error}); start again with --overwrite") from None
        if self._state.get("version") != VERSION:
            raise UserError(f"{path} was written by another version of dmquant; start again with --overwrite")
        self._read_journal()

    @property
    def model(self) -> str:
        """Name of the model the run is about."""
        return self._state["model"]

    def images(self, side: str) -> Path:
        """The folder of the images of one side, `fp` or `quantized`."""
        return self.path / IMAGES / side

    def recipe(self, name: str) -> Path:
        """The run folder of one recipe of a comparison."""
        return self.path / RECIPES / folder_name(name)

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished `stage`, or None."""
        return self._state["stages"].get(stage)

    def finished(self, stage: str, settings: str) -> dict[str, Any] | None:
        """The record of `stage` if it was finished under the fingerprint `settings`, else None."""
        record = self.record(stage)
        return record if record and record["fingerprint"] == settings else None

    def holds(self, stage: str, fingerprints: dict[str, str] | None) -> bool:
        """Whether `stage` was finished under its one of `fingerprints`; None, of earlier versions, takes any."""
        record = self.record(stage)
        return bool(record) and (fingerprints is None or record["fingerprint"] == fingerprints[stage])

    def finish(self, stage: str, settings: str, **record: Any) -> dict[str, Any]:
        """Store that `stage` is done under the fingerprint `settings`, with whatever belongs to it."""
        self._state["stages"][stage] = {"fingerprint": settings, **record}
        self._save()
        return self._state["stages"][stage]

    def forget(self, stage: str) -> None:
        """Drop the record of `stage`: its outputs are about to change."""
        if self._state["stages"].pop(stage, None):
            self._save()

    def notes(self, kind: str) -> dict[str, Any]:
        """Facts kept beside the stages, such as the seconds each image took."""
        return self._state["notes"].get(kind, {})

    def note(self, kind: str, facts: dict[str, Any]) -> None:
        """Replace the facts of one kind."""
        self._state["notes"][kind] = facts
        self._save()

    def add_notes(self, kind: str, facts: dict[str, Any]) -> None:
        """Add to the facts of one kind: one line, however many there are. A kill loses no fact that was added."""
        self._state["notes"].setdefault(kind, {}).update(facts)
        if processes.current().is_main:
            append_line(self.path / JOURNAL, json.dumps([kind, facts]))

    def _read_journal(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / JOURNAL).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # half a line, where the disk was full or the machine stopped
                    kind, facts = json.loads(line)
                    self._state["notes"].setdefault(kind, {}).update(facts)

    def _save(self) -> None:
        """Write all that is known; the journal is removed after that, and to read it twice does no harm."""
        if processes.current().is_main:
            write_text(self.path / STATE, json.dumps(self._state, indent=1) + "\n")
            (self.path / JOURNAL).unlink(missing_ok=True)

    def _empty(self) -> bool:
        return not self._state["stages"] and not any(self.path.glob(f"{IMAGES}/*/*.png"))


@contextlib.contextmanager
def claim(path: Path, model: str, overwrite: bool = False) -> Iterator[RunFolder]:
    """Hold the run folder of `model` at `path`, creating it if need be, alone until the block ends.

    With `overwrite` the entries of an earlier run are removed first; files that no run writes are never touched.
    If the block fails before anything was finished in a folder made here, the folder is removed again.

    Of several processes the main one holds it, and all get it.

    Raises:
        UserError: the folder cannot be written, holds something else, or another command is writing it.
    """
    with contextlib.ExitStack() as held:
        yield processes.current().on_main(lambda: held.enter_context(_claimed(path, model, overwrite)))


@contextlib.contextmanager
def _claimed(path: Path, model: str, overwrite: bool) -> Iterator[RunFolder]:
    _refuse_strangers(path, model, overwrite)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder with --out") from error
    with lock:
        _lock(lock, path)
        if overwrite and is_run(path):
            _remove_entries(path)
        if not is_run(path):
            write_text(path / STATE, json.dumps({"version": VERSION, "model": model, "stages": {}, "notes": {}}) + "\n")
        folder = RunFolder(path)
        try:
            yield folder
        except BaseException:
            if created and folder._empty():
                shutil.rmtree(path, ignore_errors=True)
                for parent in created[1:]:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise


def _refuse_strangers(path: Path, model: str, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder with --out")
    if overwrite:
        return
    if is_run(path):
        held = RunFolder(path).model
        if held != model:
            raise UserError(
                f"{path} holds a run of {held}, not of {model}; choose another folder with --out, "
                "or replace it with --overwrite"
            )
        return
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise UserError(
            f"{path} holds files that are not of a run ({shown}); choose another folder with --out, "
            "or write beside them with --overwrite"
        )


def _lock(file, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        raise UserError(
            f"another dmquant is writing {path}; wait for it, or choose another folder with --out"
        ) from None


def _remove_entries(path: Path) -> None:
    for entry in (path / name for name in ENTRIES if name != LOCK):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk or the user's share of it is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors raises its own type
            return True
        error = error.__cause__ or error.__context__
    return False
