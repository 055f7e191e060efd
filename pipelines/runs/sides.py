"""The two sides of every comparison, full precision and quantized.

What is already done in a side's folder is not done again. Several processes go through the same stages: what is
missing is decided by the main one, which also keeps the records, and made by all of them.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmquant.convert import component_names
from dmquant.errors import UserError
from dmquant.evaluation.generate import ImageRequest
from dmquant.evaluation.networks import Networks
from dmquant.host import owned, processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.memory import peak_memory
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.shared_parts import SharedParts
from dmquant.pipelines.models.truncation import cut_line, cut_prompts
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.batch_mates import note_batch_mates
from dmquant.pipelines.runs.image_stage import FP, QUANTIZED, complete_images, images_key
from dmquant.pipelines.runs.loaded_parts import LoadedParts
from dmquant.pipelines.runs.model_stage import is_as_written, load_quantized, load_source, make_model_together
from dmquant.pipelines.runs.probe import Probe, layer_errors, probe_full_precision, probe_key
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.scores import complete_scores, scores_key
from dmquant.pipelines.runs.settings import Settings, versions
from dmquant.pipelines.runs.source import Source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FullPrecision:
    """The full-precision side: its images, and its pipeline for as long as it is needed.

    Several quantized sides share what `parts` keeps.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source,
        folder: RunFolder,
        console: Console,
        parts: LoadedParts | None = None,
    ):
        self.settings, self.source, self.folder, self.console = settings, source, folder, console
        self.parts = parts or LoadedParts(keeps=False)
        self.requests = settings.requests(source.key)
        features, alone = folder.path / runfolder.FEATURES, settings.offload is not None
        self.networks = Networks(settings.device, settings.clip, features, console.say, alone)
        self._pipeline: DiffusionPipeline | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the settings of each stage of this side."""
        return {f"images_{FP}": images_key(self.requests)}

    def images(self) -> None:
        """Make the images that are missing."""
        complete_images(FP, self.requests, self.load, self.folder, self.settings, self.console)
        note_batch_mates(FP, self.requests, self.load, self.folder, self.settings, self.console)
        key = images_key(self.requests)
        known = self.folder.notes(runfolder.CUT_PROMPTS)
        of_these = bool(known) and known.get("images", key) == key  # of earlier versions there is no key
        if self._pipeline is not None or not of_these:
            self._tell_cut_prompts(self.load(), key)

    def _tell_cut_prompts(self, pipeline: "DiffusionPipeline", key: str) -> None:
        settings = self.settings
        cuts = cut_prompts(settings.prompted(pipeline), settings.prompts, settings.call)
        line = cut_line(cuts, len(settings.prompts))
        self.folder.note(runfolder.CUT_PROMPTS, {"line": line, "images": key})
        if line:
            self.console.say(f"note: {line}")

    def probes(self) -> dict[str, Probe]:
        """Outputs of the layers of each backbone, to compare with: from an earlier run, or made with the pipeline."""
        folder, there = self.folder.path / runfolder.PROBE, folders.components(self.source.folder)
        return {
            name: probe_full_precision(self.load, self.requests, self.settings.for_backbone(name), folder, self.console)
            for name in self.settings.family.backbones_among(there)
        }

    def load(self) -> "DiffusionPipeline":
        """The pipeline, loaded when first asked for."""
        if self._pipeline is None:
            self._pipeline = load_source(self.settings, self.console, self.parts.kept)
        return self._pipeline

    def release(self) -> None:
        """Drop the pipeline: it was quantized in place, or nothing needs it any more."""
        self._pipeline = None
        gc.collect()


class Quantized:
    """The quantized side of one recipe: its model, its images, and how these compare with full precision.

    Calibration data, and the codes of units that are finished, are kept in `workspace`. The error of each layer, and
    what a batch does to its first image, are left out unless `compares_layers`. Parts that are the same in the models
    of several recipes are saved in `shared`.
    """

    def __init__(
        self,
        settings: Settings,
        reference: FullPrecision,
        folder: RunFolder,
        workspace: Path,
        compares_layers: bool = True,
        shared: SharedParts | None = None,
    ):
        self.settings, self.reference, self.folder, self.workspace = settings, reference, folder, workspace
        self.compares_layers = compares_layers
        self.shared = None if component_names(settings.recipe) else shared
        self.console = reference.console
        self.model_key = settings.model_key(reference.source.key)
        self.saved_model_key = settings.saved_model_key(reference.source.key)
        self.requests = settings.requests(self.model_key)
        self._pipeline: DiffusionPipeline | None = None

    def make(self) -> None:
        """Model, images and the error of each layer, from where an earlier run stopped."""
        self._model()
        complete_images(QUANTIZED, self.requests, self._load, self.folder, self.settings, self.console)
        if self.compares_layers:
            note_batch_mates(QUANTIZED, self.requests, self._load, self.folder, self.settings, self.console)
            processes.current().on_main(self._layers)
        self._pipeline = None
        self.reference.release()

    def _load(self) -> "DiffusionPipeline":
        """The quantized pipeline, loaded when first asked for."""
        if self._pipeline is None:
            made = self.folder.record("model")
            loaded = self.reference.parts.of(self.settings.family.names, made["sha256"] | made.get("parts_sha256", {}))
            self._pipeline = load_quantized(self.folder.path / runfolder.MODEL, self.settings, **loaded)
            self.reference.parts.keep(self._pipeline)
        return self._pipeline

    def _probe_reference(self) -> None:
        with self._going_on_without():
            self.reference.probes()

    def _layers(self) -> None:
        settings, reference = self.settings, self.reference
        key = _layers_key(self.model_key, reference.requests, settings)
        weight_errors = self.folder.record("model").get("weight_errors")
        if self.folder.finished(runfolder.LAYERS, key) or not weight_errors:
            return
        with self._going_on_without():
            self.folder.finish(runfolder.LAYERS, key, layers=self._errors_of_layers(weight_errors))

    def _errors_of_layers(self, weight_errors: dict[str, float]) -> list[dict[str, Any]]:
        pipeline = self._load()
        others = component_names(self.settings.recipe)
        return [
            asdict(layer)
            for name, probe in self.reference.probes().items()
            if name not in others
            for layer in layer_errors(pipeline, probe, weight_errors, self.settings.for_backbone(name), self.console)
        ]

    @contextlib.contextmanager
    def _going_on_without(self) -> Iterator[None]:
        """A model is worth having without the errors of its layers."""
        try:
            yield
        except UserError as error:
            self.console.say(f"note: the errors of the layers are not known: {error}")

    def _model(self) -> None:
        path = self.folder.path / runfolder.MODEL
        if processes.current().on_main(lambda: self._is_made(path)):
            self.console.say("model: already there")
            self.reference.release()
            return
        self.folder.forget("model")
        if self.compares_layers:
            processes.current().on_main(self._probe_reference)  # quantizing takes place in the same pipeline
        try:
            with peak_memory(self.settings.device) as peak:
                facts = make_model_together(
                    self.reference.load,
                    self.settings,
                    path,
                    self.console,
                    self.workspace,
                    self.reference.source.key,
                    self.shared,
                )
        finally:
            self.reference.release()
        self.console.say(f"model: peak memory {peak.in_words()}")
        self.folder.finish(
            "model", self.saved_model_key, **facts, peak_memory_bytes=peak.bytes, peak_memory_of=peak.what
        )

    def _is_made(self, path: Path) -> bool:
        """Whether the model is there as it was written."""
        record = self.folder.finished("model", self.saved_model_key)
        if not record or not path.is_dir():
            return False
        as_written = is_as_written(path, record["sha256"] | record.get("parts_sha256", {}))
        if not as_written:
            self.console.say("model: its files are not what was written, making it again")
        return as_written

    def score(self) -> None:
        """The scores that are missing."""
        complete_scores(self.folder, self.sides(), self.settings, self.reference.networks, self.console)

    def sides(self) -> dict[Path, list[str]]:
        """The folders of images that are compared, full precision first, with the keys of their images."""
        return {
            self.reference.folder.images(FP): [request.key for request in self.reference.requests],
            self.folder.images(QUANTIZED): [request.key for request in self.requests],
        }


def fingerprints_of(settings: Settings, reference: FullPrecision) -> dict[str, str]:
    """By stage of the quantized side, the fingerprint of the settings that it is done under."""
    model_key = settings.model_key(reference.source.key)
    requests = settings.requests(model_key)
    keys = {FP: reference.requests, QUANTIZED: requests}
    return {
        "model": settings.saved_model_key(reference.source.key),
        f"images_{QUANTIZED}": images_key(requests),
        runfolder.LAYERS: _layers_key(model_key, reference.requests, settings),
        "scores": scores_key({side: [request.key for request in made] for side, made in keys.items()}, settings),
    }


def _layers_key(model_key: str, reference: Sequence[ImageRequest], settings: Settings) -> str:
    return fingerprint(model=model_key, probe=probe_key(reference, settings))


def shared_parts(settings: Settings, source: Source, folder: RunFolder) -> SharedParts:
    """The place of the parts that the models of one folder share, since none of them changes these."""
    key = fingerprint(source=source.key, dtype=settings.dtype_name, versions=versions())
    return SharedParts(folder.path / owned.ROOM / runfolder.SHARED, key)
