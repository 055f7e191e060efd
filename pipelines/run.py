"""A run: images, model, images again, scores, grid, report; what is already done in its folder is not done again."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import dmquant
from dmquant.evaluation.files import write_text
from dmquant.evaluation.generate import Generated, missing, prune
from dmquant.evaluation.grid import draw_grid
from dmquant.evaluation.images import any_images
from dmquant.evaluation.report import write_report
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


class Run:
    """One run: its settings, its folder, and the full-precision pipeline for as long as it is needed."""

    def __init__(self, settings: Settings, source: Path, folder: RunFolder, console: Console):
        self.settings, self.folder, self.console = settings, folder, console
        component = settings.family.component
        with console.bar("hash of the weights") as bar:
            self.source_hashes = pipeline_hashes(source, component, bar)
        self.source_key = fingerprint(files=self.source_hashes)
        self.model_key = fingerprint(
            source=self.source_key,
            recipe=settings.recipe.to_dict(),
            dtype=settings.dtype_name,
            dmquant=dmquant.__version__,
        )
        self.requests = {FP: settings.requests(self.source_key), QUANTIZED: settings.requests(self.model_key)}
        self._full_precision: DiffusionPipeline | None = None

    def finish(self) -> None:
        """Every stage in order, from where an earlier run stopped."""
        settings, console = self.settings, self.console
        weights, activations = settings.formats
        console.say(
            f"{settings.model.name}: weights {weights}, activations {activations}, recipe {settings.recipe.name}; "
            f"{len(settings.prompts)} prompts, {settings.steps} steps, guidance {settings.guidance:g}, "
            f"{settings.width}x{settings.height}, seed {settings.seed}; {settings.device}, {settings.dtype_name}"
        )
        record = settings.to_dict(self.source_hashes)
        write_text(
            self.folder.path / runfolder.SETTINGS,
            yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120),
        )
        self._images(FP, self._load_full_precision)
        self._model()
        self._images(QUANTIZED, self._load_quantized)
        self._scores()
        self._report(record)

    def _load_full_precision(self) -> "DiffusionPipeline":
        if self._full_precision is None:
            settings = self.settings
            self._full_precision = load_full_precision(
                settings.model, settings.dtype, settings.device, self.console.say
            )
        return self._full_precision

    def _load_quantized(self) -> "DiffusionPipeline":
        return load_quantized(self.folder.path / runfolder.MODEL, self.settings)

    def _images(self, side: str, load: Callable[[], "DiffusionPipeline"]) -> None:
        requests, stage = self.requests[side], f"images_{side}"
        images = self.folder.images(side)
        prune(images, requests)
        absent = missing(images, requests)
        settings = fingerprint(images=[request.key for request in requests])
        if not absent and self.folder.finished(stage, settings):
            self.console.say(f"{TITLES[side]}: all {len(requests)} are there")
            return
        earlier = self.folder.record(stage) or {}
        measured = {name: earlier.get(name) for name in ("peak_memory_bytes", "peak_memory_of", "not_finite")}
        if absent:
            with peak_memory(self.settings.device) as peak:
                generated = make_images(
                    load(), requests, images, self.settings, self.console, TITLES[side], self._note(side)
                )
            measured = {
                "peak_memory_bytes": peak.bytes,
                "peak_memory_of": peak.what,
                "not_finite": generated.not_finite,
            }
        self.folder.finish(stage, settings, images=len(requests), **measured)

    def _note(self, side: str) -> Callable[[Generated], None]:
        """Remember after every batch what its images took, so that a killed run can still say it."""
        kind, keys = f"seconds_{side}", {request.key for request in self.requests[side]}
        before = {key: seconds for key, seconds in self.folder.notes(kind).items() if key in keys}
        return lambda generated: self.folder.note(kind, before | generated.seconds)

    def _model(self) -> None:
        path = self.folder.path / runfolder.MODEL
        record = self.folder.finished("model", self.model_key)
        if record and path.is_dir():
            if is_as_written(path, self.settings.family.component, record["sha256"]):
                self.console.say("model: already there")
                self._full_precision = None
                return
            self.console.say("model: its files are not what was written, making it again")
        self.folder.forget("model")
        with peak_memory(self.settings.device) as peak:
            facts = make_model(self._load_full_precision(), self.settings, path, self.console)
        self._full_precision = None
        gc.collect()
        self.folder.finish("model", self.model_key, **facts, peak_memory_bytes=peak.bytes, peak_memory_of=peak.what)

    def _scores(self) -> None:
        settings, folder = self.settings, self.folder
        key = fingerprint(
            images={side: [request.key for request in requests] for side, requests in self.requests.items()},
            real=None if settings.real is None else _listing(settings.real),
        )
        record = folder.finished("scores", key) or {"metrics": {}, "reference": {}, "seconds": 0.0}
        known = {name for name, metric in record["metrics"].items() if metric["value"] is not None}
        wanted = [name for name in settings.metrics if name not in known]
        if not wanted:
            self.console.say("scores: already there")
            return
        began = time.perf_counter()
        metrics, reference = make_scores(
            folder.images(FP), folder.images(QUANTIZED), wanted, settings.real, settings.device, self.console
        )
        seconds = time.perf_counter() - began
        folder.finish(
            "scores",
            key,
            metrics=record["metrics"] | {name: metric.to_json() for name, metric in metrics.items()},
            reference=record["reference"] | {name: metric.to_json() for name, metric in reference.items()},
            seconds=record["seconds"] + seconds,
        )
        self.console.say(f"scores: {', '.join(wanted)} in {seconds:.1f} s")

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


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the images in a folder: enough to notice that it changed."""
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in any_images(folder)]
