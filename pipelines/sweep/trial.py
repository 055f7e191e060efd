"""A trial: make a model, make and score its images, and keep only what the tables need."""

import contextlib
import io
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rich.console
import torch

from dmquant.errors import UserError
from dmquant.evaluation.networks import Networks
from dmquant.host import owned
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.files import fingerprint, sealed_json, take_seal, write_text
from dmquant.host.owned import Owned
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.calibration import data_key
from dmquant.pipelines.runs.image_stage import FP, QUANTIZED
from dmquant.pipelines.runs.runfolder import RunFolder, claim, is_full_disk
from dmquant.pipelines.runs.scores import scores_key
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.sides import FullPrecision, Quantized, shared_parts
from dmquant.pipelines.runs.source import Source


@dataclass(frozen=True)
class Task:
    """A trial as a process of its own can do it: all paths are absolute.

    The folder `sweep` holds the full-precision images of `source`.
    """

    settings: Settings
    source: Source
    sweep: Path
    keep_images: bool

    @property
    def name(self) -> str:
        return self.settings.recipe.name

    @property
    def folder(self) -> Path:
        """The work folder of the trial; its content is removed when the trial is done, except images that are kept."""
        return runfolder.folder_for(self.sweep / runfolder.TRIALS, self.name)

    @property
    def record(self) -> Path:
        """The file of what is known of the trial when it is done."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def key(self) -> str:
        """Fingerprint of all that the result depends on."""
        sides = {FP: self.source.key, QUANTIZED: self.settings.model_key(self.source.key)}
        images = {side: [request.key for request in self.settings.requests(key)] for side, key in sides.items()}
        return fingerprint(scores=scores_key(images, self.settings), clip=self.settings.clip)

    def done(self) -> dict[str, Any] | None:
        """The record of the trial if it was done with these settings and metrics, and its images are kept if asked."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or take_seal(record) is False:
            return None
        if record["fingerprint"] != self.key or not set(self.settings.metrics) <= record["metrics"].keys():
            return None
        return None if self.keep_images and not (self.folder / runfolder.IMAGES).is_dir() else record

    def tidy(self) -> None:
        """Remove what a finished trial does not need."""
        ours = Owned(self.folder)
        ours.clear(keep=lambda name: self.keep_images and name.startswith(f"{runfolder.IMAGES}/"))
        if not self.keep_images:
            ours.leave()


@dataclass(frozen=True)
class Failure:
    """Why a trial could not be done; with a full disk no other can either."""

    reason: str
    disk_is_full: bool = False


class _Logging(Console):
    """The console of one of several trials at once: lines go to the trial's log, and bars nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self._bars = rich.console.Console(file=io.StringIO())

    def say(self, line: str) -> None:
        self.note(line)


def run_trial(task: Task) -> dict[str, Any] | Failure:
    """Do a trial, from where an earlier attempt stopped; returns its record, which is also written."""
    quiet_libraries()
    console = _Logging()
    try:
        with owned.joined(task.sweep):
            with (
                claim(task.folder, task.settings.model.name) as folder,
                console.logging_to(task.folder / runfolder.LOG),
                _traceback_in(console),
            ):
                record = _do(task, folder, console)
            # Only now are all files in the folder known to be ours, which whoever tidies up after a kill goes by.
            write_text(task.record, json.dumps(sealed_json(record), indent=1) + "\n")
        task.tidy()
    except UserError as error:
        return Failure(" ".join(str(error).split()), is_full_disk(error))
    except Exception as error:
        return Failure(f"{type(error).__name__}: {' '.join(str(error).split())}", is_full_disk(error))
    return record


@contextlib.contextmanager
def _traceback_in(console: Console) -> Iterator[None]:
    """Log the traceback of an error that nobody foresaw."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        console.note(traceback.format_exc())
        raise


def _do(task: Task, folder: RunFolder, console: Console) -> dict[str, Any]:
    settings, began = task.settings, time.perf_counter()
    reference = FullPrecision(settings, task.source, RunFolder(task.sweep), console)
    # Features of a trial's images are of no use to another; in a shared folder they would add up.
    features = folder.path / runfolder.FEATURES
    alone = settings.offload is not None
    reference.networks = Networks(settings.device, settings.clip, features, console.say, alone)
    shared = shared_parts(settings, task.source, reference.folder)
    calibration = folder.path / runfolder.CALIBRATION
    quantized = Quantized(settings, reference, folder, calibration, compares_layers=False, shared=shared)
    quantized.make()
    quantized.score()
    model, images, scores = (folder.record(stage) for stage in ("model", f"images_{QUANTIZED}", "scores"))
    weights, activations = settings.formats
    measured = ("bits_per_quantized_weight", "bits_per_weight", "size_bytes", "quantized_weights", "parameters")
    return {
        "fingerprint": task.key,
        "name": task.name,
        "weights": weights,
        "activations": activations,
        **{name: model[name] for name in measured},
        "seconds": {
            "quantize": model["seconds"],
            "generate": sum(folder.notes(f"seconds_{QUANTIZED}").values()),
            "score": scores["seconds"],
            "trial": time.perf_counter() - began,
        },
        "peak_memory_bytes": max(stage["peak_memory_bytes"] or 0 for stage in (model, images)),
        "peak_memory_of": model["peak_memory_of"],
        "not_finite": images["not_finite"] or 0,
        "threads": torch.get_num_threads(),
        "metrics": {name: scores["metrics"][name] for name in settings.metrics},
    }


def with_shared_data(settings: Settings, sweep: Path, weights: str) -> Settings:
    """The same with the calibration data that all trials of one sampling share, in the folder `sweep` unless given.

    `weights` is the key of the full-precision pipeline.
    """
    if not settings.recipe.calibrated or settings.calibration_data is not None:
        return settings
    return replace(settings, calibration_data=sweep / runfolder.CALIBRATION / data_key(settings, weights)[:8])
