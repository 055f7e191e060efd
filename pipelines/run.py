"""The two sides of every comparison, full precision and quantized, and the run that makes one of each.

What is already done in a side's folder is not done again.
"""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dmquant.evaluation.generate import Generated, ImageRequest, missing, prune
from dmquant.evaluation.grid import draw_grid
from dmquant.evaluation.images import any_images
from dmquant.evaluation.report import write_report
from dmquant.files import write_text
from dmquant.pipelines import runfolder
from dmquant.pipelines.console import Console
from dmquant.pipelines.hashes import pipeline_hashes
from dmquant.pipelines.loading import load_full_precision
from dmquant.pipelines.memory import peak_memory
from dmquant.pipelines.reporting import build_report, closing_table
from dmquant.pipelines.runfolder import RunFolder, fingerprint
from dmquant.pipelines.settings import Settings
from dmquant.pipelines.work import is_as_written, load_quantized, make_images, make_model, make_scores

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FP, QUANTIZED = "fp", "quantized"
TITLES = {FP: "full-precision images", QUANTIZED: "quantized images"}


class FullPrecision:
    """The full-precision side: its weights' hashes, its images, and its pipeline for as long as it is needed."""

    def __init__(self, settings: Settings, source: Path, folder: RunFolder, console: Console):
        self.settings, self.folder, self.console = settings, folder, console
        with console.bar("hash of the weights") as bar:
            self.source_hashes = pipeline_hashes(source, settings.family.component, bar)
        self.source_key = fingerprint(files=self.source_hashes)
        self.requests = settings.requests(self.source_key)
        self._pipeline: DiffusionPipeline | None = None

    def images(self) -> None:
        """Make the images that are missing."""
        _complete_images(FP, self.requests, self.load, self.folder, self.settings, self.console)

    def load(self) -> "DiffusionPipeline":
        """The pipeline, loaded when first asked for."""
        if self._pipeline is None:
            settings = self.settings
            self._pipeline = load_full_precision(settings.model, settings.dtype, settings.device, self.console.say)
        return self._pipeline

    def release(self) -> None:
        """Drop the pipeline: it was quantized in place, or nothing needs it any more."""
        self._pipeline = None
        gc.collect()


class Quantized:
    """The quantized side of one recipe: its model, its images, and how these compare with full precision.

    Calibration data, and the codes of units that are finished, are kept in `workspace`.
    """

    def __init__(self, settings: Settings, reference: FullPrecision, folder: RunFolder, workspace: Path):
        self.settings, self.reference, self.folder, self.workspace = settings, reference, folder, workspace
        self.console = reference.console
        self.model_key = settings.model_key(reference.source_key)
        self.requests = settings.requests(self.model_key)

    def make(self) -> None:
        """Model and images, from where an earlier run stopped."""
        self._model()
        _complete_images(QUANTIZED, self.requests, self._load, self.folder, self.settings, self.console)

    def _load(self) -> "DiffusionPipeline":
        return load_quantized(self.folder.path / runfolder.MODEL, self.settings)

    def _model(self) -> None:
        path = self.folder.path / runfolder.MODEL
        record = self.folder.finished("model", self.model_key)
        if record and path.is_dir():
            if is_as_written(path, self.settings.family.component, record["sha256"]):
                self.console.say("model: already there")
                self.reference.release()
                return
            self.console.say("model: its files are not what was written, making it again")
        self.folder.forget("model")
        try:
            with peak_memory(self.settings.device) as peak:
                pipeline = self.reference.load()
                facts = make_model(pipeline, self.settings, path, self.console, workspace=self.workspace)
        finally:
            self.reference.release()
        self.folder.finish("model", self.model_key, **facts, peak_memory_bytes=peak.bytes, peak_memory_of=peak.what)

    def score(self) -> None:
        """The scores that are missing."""
        settings, folder = self.settings, self.folder
        sides = {FP: self.reference.requests, QUANTIZED: self.requests}
        key = fingerprint(
            images={side: [request.key for request in requests] for side, requests in sides.items()},
            real=None if settings.real is None else _listing(settings.real),
        )
        record = folder.finished("scores", key) or {"metrics": {}, "reference": {}, "seconds": 0.0}
        known = {name for name, metric in record["metrics"].items() if metric["value"] is not None}
        wanted = [name for name in settings.metrics if name not in known]
        if not wanted:
            self.console.say("scores: already there")
            return
        began = time.perf_counter()
        fp, quantized = self.reference.folder.images(FP), folder.images(QUANTIZED)
        metrics, reference = make_scores(fp, quantized, wanted, settings.real, settings.device, self.console)
        seconds = time.perf_counter() - began
        folder.finish(
            "scores",
            key,
            metrics=record["metrics"] | {name: metric.to_json() for name, metric in metrics.items()},
            reference=record["reference"] | {name: metric.to_json() for name, metric in reference.items()},
            seconds=record["seconds"] + seconds,
        )
        self.console.say(f"scores: {', '.join(wanted)} in {seconds:.1f} s")


class Run:
    """A model and one recipe: both sides, a grid and a report in one folder."""

    def __init__(self, settings: Settings, source: Path, folder: RunFolder, console: Console):
        self.settings, self.folder, self.console = settings, folder, console
        self.reference = FullPrecision(settings, source, folder, console)
        self.quantized = Quantized(settings, self.reference, folder, folder.path / runfolder.CALIBRATION)

    def finish(self) -> None:
        """Every stage in order, from where an earlier run stopped."""
        self.console.say(f"{quantization_line(self.settings)}; {images_line(self.settings)}")
        recipe = {"recipe": self.settings.recipe.to_dict()}
        record = save_settings(self.folder, self.settings.to_dict(self.reference.source_hashes, recipe))
        self.reference.images()
        self.quantized.make()
        self.quantized.score()
        self._report(record)

    def _report(self, record: dict[str, Any]) -> None:
        path = self.folder.path
        heading = "W {} A {}".format(*(name.partition("_")[0] for name in self.settings.formats))
        draw_grid(
            {"full precision": self.folder.images(FP), heading: self.folder.images(QUANTIZED)},
            self.settings.prompts,
            path / runfolder.GRID,
        )
        result = build_report(self.folder, record)
        write_report(path, result)
        self.console.show(closing_table(result))
        self.console.say(
            f"report: {path / 'report.html'}   grid: {path / runfolder.GRID}   model: {path / runfolder.MODEL}"
        )


def quantization_line(settings: Settings) -> str:
    """Which model becomes what, for people."""
    weights, activations = settings.formats
    return f"{settings.model.name}: weights {weights}, activations {activations}, recipe {settings.recipe.name}"


def images_line(settings: Settings) -> str:
    """Which images are made, and where, for people."""
    return (
        f"{len(settings.prompts)} prompts, {settings.steps} steps, guidance {settings.guidance:g}, "
        f"{settings.width}x{settings.height}, seed {settings.seed}; {settings.device}, {settings.dtype_name}"
    )


def save_settings(folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """Write run.yaml; returns what it holds."""
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)
    write_text(folder.path / runfolder.SETTINGS, text)
    return record


def _complete_images(
    side: str,
    requests: Sequence[ImageRequest],
    load: Callable[[], "DiffusionPipeline"],
    folder: RunFolder,
    settings: Settings,
    console: Console,
) -> None:
    """Make the images of one side that its folder lacks, and remember what they took."""
    images, stage = folder.images(side), f"images_{side}"
    prune(images, requests)
    absent = missing(images, requests)
    key = fingerprint(images=[request.key for request in requests])
    if not absent and folder.finished(stage, key):
        console.say(f"{TITLES[side]}: all {len(requests)} are there")
        return
    earlier = folder.record(stage) or {}
    measured = {name: earlier.get(name) for name in ("peak_memory_bytes", "peak_memory_of", "not_finite")}
    if absent:
        note = _noting_seconds(folder, f"seconds_{side}", requests)
        with peak_memory(settings.device) as peak:
            generated = make_images(load(), requests, images, settings, console, TITLES[side], note)
        measured = {
            "peak_memory_bytes": peak.bytes,
            "peak_memory_of": peak.what,
            "not_finite": generated.not_finite,
        }
    folder.finish(stage, key, images=len(requests), **measured)


def _noting_seconds(folder: RunFolder, kind: str, requests: Sequence[ImageRequest]) -> Callable[[Generated], None]:
    """Remember after every batch what its images took, so that a killed run can still say it."""
    keys = {request.key for request in requests}
    before = {key: seconds for key, seconds in folder.notes(kind).items() if key in keys}
    return lambda generated: folder.note(kind, before | generated.seconds)


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the images in a folder: enough to notice that it changed."""
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in any_images(folder)]
