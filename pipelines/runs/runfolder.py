"""A run folder: its content, the lock of its writer, and the record of finished stages.

A run of one recipe holds both sides, full precision and quantized. A comparison holds the full-precision side, and a
run folder for the quantized side of each recipe below `recipes/`.

`state.json` is the memory of a run. A stage is done when its record there carries the fingerprint of exactly the
settings the stage depends on and the files it wrote are still what it wrote, so the same command continues after a
kill, and a changed setting redoes what depends on it and nothing else. Facts that come one by one while a stage runs
are lines added to a journal, which the next record takes into `state.json`. Both carry hashes: a state that is not
what was written is no memory, and what it stood for is done again.
"""

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmquant.errors import UserError
from dmquant.evaluation.png import read_key
from dmquant.host import owned, processes
from dmquant.host.files import append_line, json_sha256, sealed_json, take_seal, write_text
from dmquant.host.names import folder_of
from dmquant.host.owned import Owned

VERSION = 1
STATE, SETTINGS, LOG = "state.json", "run.yaml", "log.txt"
JOURNAL, MODEL_NAME = "state.journal", "model.txt"  # in the room of a run
GRID, PLOT = "grid.png", "compare.png"
SCORES, FEATURES, PROBE = "scores.csv", "features", "probe"
LAYERS, CUT_PROMPTS = "layers", "cut_prompts"  # a stage, and a kind of notes
IMAGES, MODEL, CALIBRATION, RECIPES, TRIALS = "images", "model", "calibration", "recipes", "trials"
SHARED = "shared"  # in the room of a run
COSTS, COSTS_TABLE, COSTS_PAGE, COSTS_PLOT = "costs.json", "costs.csv", "sensitivity.html", "sensitivity.png"
OPTIONS, SENSITIVITY, KEEP = "options", "sensitivity", "keep.yaml"
CHOSEN = "chosen.yaml"  # the recipe that a target was reached with
SWEEP_TABLE, SWEEP_PLOT, SWEEP_PAGE, SWEEP_DATA = "sweep.csv", "sweep.png", "sweep.md", "sweep.json"
REPORTS = ("report.md", "report.html", "report.json")
ENTRIES = (
    *(STATE, SETTINGS, LOG, GRID, PLOT, SCORES, FEATURES, PROBE),
    *(IMAGES, MODEL, CALIBRATION, RECIPES, TRIALS),
    *(SWEEP_TABLE, SWEEP_PLOT, SWEEP_PAGE, SWEEP_DATA),
    *(COSTS, COSTS_TABLE, COSTS_PAGE, COSTS_PLOT, OPTIONS, SENSITIVITY, KEEP, CHOSEN),
    *REPORTS,
)
WRITTEN = (
    *(STATE, SETTINGS, LOG, GRID, PLOT, SCORES, *REPORTS, SWEEP_TABLE, SWEEP_PLOT, SWEEP_PAGE, SWEEP_DATA),
    *(COSTS, COSTS_TABLE, COSTS_PAGE, COSTS_PLOT, KEEP, CHOSEN),
    *(f"{OPTIONS}/*/{name}" for name in ("measured.json", "[0-9]*.safetensors")),
    *(f"{IMAGES}/*/[0-9]*.{suffix}" for suffix in ("png", "latent.safetensors", "trajectory.safetensors")),
    *(f"{CALIBRATION}/data/*/{name}" for name in ("index.json", "prompts-*.safetensors")),
    *(f"{CALIBRATION}/*/blocks/[0-9]*.{suffix}" for suffix in ("json", "safetensors")),
    *(
        f"{FEATURES}/*/*.safetensors",
        f"{PROBE}/fp.safetensors",
        f"{MODEL}/README.md",
        f"{MODEL}/checksums.json",
        f"{TRIALS}/*.json",
    ),
)
"""Patterns of what commands write in a run folder, the model aside, which lists its files itself."""
EARLIER = re.compile(r"[\w+-][\w.+-]*")
LOG_BEGINS = "times are UTC\n"
SHORT = 16  # characters of a hash that tell a line of the journal that was changed


def folder_for(parent: Path, name: str) -> Path:
    """The folder in `parent` for a recipe's name: the recipe's alone, and below `parent` whatever the name holds.

    Versions up to 0.2 gave names with capitals to folders as they are; such a folder stays the recipe's.
    """
    own = folder_of(name)
    if own != name and EARLIER.fullmatch(name) and parent.is_dir():
        there = {entry.name for entry in parent.iterdir()}
        own = name if {name, f"{name}.json"} & there else own
    return parent / own


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run."""
    return (folder / STATE).is_file()


class RunFolder:
    """The folder of a run; get one with `claim` (to write) or `RunFolder(path)` (to read).

    Where several processes run, each remembers the finished stages, and the main one writes them down.
    """

    def __init__(self, path: Path):
        self.path = path
        self._state = _read_state(path)
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
        return folder_for(self.path / RECIPES, name)

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
            append_line(self._journal, json.dumps([kind, facts, json_sha256([kind, facts])[:SHORT]]))

    @property
    def has_stages(self) -> bool:
        """Whether any stage is finished."""
        return bool(self._state["stages"])

    @property
    def _journal(self) -> Path:
        return self.path / owned.ROOM / JOURNAL

    def _read_journal(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
                # half a line, where the disk was full or the machine stopped, or one that was changed
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    kind, facts, digest = json.loads(line)
                    if json_sha256([kind, facts])[:SHORT] == digest:
                        self._state["notes"].setdefault(kind, {}).update(facts)

    def _save(self) -> None:
        """Write all that is known; the journal is emptied after that, and to read it twice does no harm."""
        if processes.current().is_main:
            state = json.loads(json.dumps(self._state))  # as it will be read, with every key a string
            write_text(self.path / STATE, json.dumps(sealed_json(state), indent=1, sort_keys=True) + "\n")
            owned.drop(self._journal)


def _read_state(path: Path) -> dict[str, Any]:
    """The content of state.json; UserError where there is none, or one that is not what was written."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise UserError(f"{path} was written by another version of dmquant; start anew with --overwrite")
        if take_seal(state) is False:  # versions up to 0.2 wrote none
            raise ValueError("it is not what was written")
        if not (isinstance(state["model"], str) and _are_objects(state["stages"]) and _are_objects(state["notes"])):
            raise ValueError("it holds something else than the stages of a run")
    except FileNotFoundError:
        raise UserError(f"{path} holds no run: there is no {STATE} in it") from None
    except OSError as error:
        raise UserError(f"cannot read {path / STATE}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedState(f"{path / STATE} is damaged ({error}): the command of the run makes it again") from None
    return state


def _are_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


class DamagedState(UserError):  # noqa: N818
    """A state.json that is not what was written."""


@contextlib.contextmanager
def claim(path: Path, model: str, overwrite: bool = False) -> Iterator[RunFolder]:
    """Hold the run folder of `model` at `path`, creating it if need be, alone until the block ends.

    With `overwrite` the run starts anew: what an earlier run wrote is removed first. Files that are not of a run are
    never touched. If the block fails before anything was finished in a folder made here, the folder is removed again.

    Of several processes the main one holds it, and all get it.

    Raises:
        UserError: the folder cannot be written, holds something else, or another command is writing it.
    """
    with contextlib.ExitStack() as held:
        everyone = processes.current()
        folder = everyone.on_main(lambda: held.enter_context(_claimed(path, model, overwrite)))
        if not everyone.is_main:
            held.enter_context(owned.joined(path))
        yield folder


@contextlib.contextmanager
def _claimed(path: Path, model: str, overwrite: bool) -> Iterator[RunFolder]:
    _refuse_strangers(path, model, overwrite)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    with owned.claimed(path) as ours:
        if overwrite:
            ours.clear(keep=lambda name: name == LOG)
        elif not ours.has_notes:
            _adopt(ours)
        _begin_log(ours)
        try:
            yield _opened(path, model)
        except BaseException:
            _note_log(ours)
            if created and _is_empty(path):
                ours.clear()
                ours.leave()
                owned.remove_empty(set(created))
            raise
        _note_log(ours)


def _opened(path: Path, model: str) -> RunFolder:
    """The run in a folder that is held, begun where there is none, or one whose memory is damaged."""
    try:
        return RunFolder(path)
    except DamagedState as error:
        logging.getLogger("dmquant").warning("note: %s", error)
    except UserError:
        if (path / STATE).exists():
            raise
    (path / owned.ROOM / MODEL_NAME).write_text(model, encoding="utf-8")
    owned.drop(path / owned.ROOM / JOURNAL)
    write_text(path / STATE, json.dumps({"version": VERSION, "model": model, "stages": {}, "notes": {}}) + "\n")
    return RunFolder(path)


def _is_empty(path: Path) -> bool:
    """Whether a run has finished nothing yet."""
    try:
        kept = (f"{IMAGES}/*/*.png", f"{OPTIONS}/*/*.safetensors", f"{SENSITIVITY}/{OPTIONS}/*/*.safetensors")
        return not RunFolder(path).has_stages and not any(any(path.glob(pattern)) for pattern in kept)
    except UserError:
        return not (path / STATE).exists()


def _begin_log(ours: Owned) -> None:
    """Have a log that begins as one of ours does; of a log in its place that is somebody else's nothing changes."""
    log = ours.root / LOG
    if not ours.extends(log):
        write_text(log, LOG_BEGINS)


def _note_log(ours: Owned) -> None:
    """The log is written line by line, so that its hash is known at the end only."""
    with contextlib.suppress(OSError):
        ours.record(ours.root / LOG)


def _adopt(ours: Owned) -> None:
    """Take the files of a run for ours that is there without notes: of versions up to 0.2, or copied without them."""
    if is_run(ours.root):
        logging.getLogger("dmquant").warning(
            "note: %s has no notes on what dmquant wrote there: files with the names of a run's are taken for its own",
            ours.root,
        )
        for path in (path for pattern in WRITTEN for path in ours.root.glob(pattern) if path.is_file()):
            if path.suffix != ".png" or path.parent == ours.root or read_key(path):
                ours.record(path)


def _refuse_strangers(path: Path, model: str, overwrite: bool) -> None:
    """UserError for a place that a run of `model` cannot have without taking something from somebody."""
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing; choose another folder with --out")
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder with --out")
    held = _model_of(path)
    if held is not None:
        if held != model and not overwrite:
            raise UserError(
                f"{path} holds a run of {held}, not of {model}; choose another folder with --out, "
                "or replace it with --overwrite"
            )
        return
    if owned.of(path / STATE) is not None:
        return  # within a folder of ours, whose command was told about it
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name != owned.ROOM)
    in_the_way = [name for name in strangers if name in ENTRIES] if overwrite else strangers
    if in_the_way:
        advice = "" if overwrite else ", or write beside them with --overwrite"
        raise UserError(
            f"{path} holds files that are not of a run ({shortened(in_the_way)}); "
            f"choose another folder with --out{'' if set(strangers) & set(ENTRIES) else advice}"
        )


def _model_of(path: Path) -> str | None:
    """The name of the model that the run in a folder is about; None where there is no run."""
    with contextlib.suppress(OSError, ValueError):
        if owned.is_room(path / owned.ROOM):
            return (path / owned.ROOM / MODEL_NAME).read_text(encoding="utf-8")
    try:
        return RunFolder(path).model
    except UserError:
        return None


def shortened(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk or the user's share of it is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors raises its own type
            return True
        error = error.__cause__ or error.__context__
    return False
