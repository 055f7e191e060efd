"""The quantized side of a comparison whose model is a file of others, put into the full-precision pipeline."""

import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from dmquant.diffusers.families import family_of_backbone
from dmquant.diffusers.timesteps import tell_timesteps
from dmquant.errors import UserError
from dmquant.exchange.applying import OTHER_PARTS, Applied, apply_, places
from dmquant.exchange.checking import check
from dmquant.exchange.interfaces import Foreign
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.memory import peak_memory
from dmquant.host.units import size_text
from dmquant.pipelines.runs.file_recipe import FileRecipe
from dmquant.pipelines.runs.model_stage import BYTES_IN_16_BIT
from dmquant.pipelines.runs.probe import layer_errors
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.sides import Quantized

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def put_into(pipeline: "DiffusionPipeline", component: str, foreign: Foreign, model: str, console: Console) -> Applied:
    """Put what a file holds into the backbone of a full-precision pipeline, in place.

    `model` is what the user calls it. UserError where the file is of another model, or mislabelled.
    """
    backbone = getattr(pipeline, component)
    if (family := family_of_backbone(type(backbone).__name__)) and len(family.backbones_of(pipeline)) > 1:
        others = " and ".join(name for name in family.backbones_of(pipeline) if name != component)
        raise UserError(f"{model} has {others} beside its {component}, and a file holds one: quantize the model itself")
    found = places(foreign, backbone, model)
    check(foreign, found, backbone, model)
    with console.bar("weights of the file") as bar, torch.no_grad():
        applied = apply_(foreign, found, backbone, model, bar)
    tell_timesteps(backbone)
    return applied


def side_of(settings: Settings, *given: Any, **more: Any) -> Quantized:
    """The quantized side of a recipe, or of a file in the place of one; arguments are those of `Quantized`."""
    return (FromFile if isinstance(settings.recipe, FileRecipe) else Quantized)(settings, *given, **more)


class FromFile(Quantized):
    """A file in the place of a recipe. There is no folder of its model: the file itself is that."""

    def _load(self) -> "DiffusionPipeline":
        if self._pipeline is None:
            self._pipeline, _ = self._filled()
        return self._pipeline

    def _filled(self) -> "tuple[DiffusionPipeline, Applied]":
        settings, reference = self.settings, self.reference
        pipeline = reference.load()
        try:
            applied = put_into(
                pipeline, settings.family.component, settings.recipe.foreign, settings.model.name, self.console
            )
        finally:
            reference.release()  # its backbone is the file's from here on
        return pipeline, applied

    def _model(self) -> None:
        if processes.current().on_main(lambda: self.folder.finished("model", self.saved_model_key)):
            self.console.say("model: looked at already")
            self.reference.release()
            return
        if self.compares_layers:
            processes.current().on_main(self._probe_reference)
        began = time.perf_counter()
        with peak_memory(self.settings.device) as peak:
            self._pipeline, applied = self._filled()
        facts = file_facts(self.settings.recipe, applied) | {"seconds": time.perf_counter() - began}
        for note in applied.notes:
            self.console.say(f"note: {note}")
        self.console.say(
            f"model: {facts['layers']} layers, {facts['bits_per_quantized_weight']:.2f} bits a quantized weight, "
            f"{facts['bits_per_weight']:.2f} over all; {size_text(facts['size_bytes'])} "
            f"({size_text(facts['full_precision_bytes'])} in 16 bit)"
        )
        self.folder.finish(
            "model", self.saved_model_key, **facts, peak_memory_bytes=peak.bytes, peak_memory_of=peak.what
        )

    def _errors_of_layers(self, weight_errors: dict[str, float]) -> list[dict[str, Any]]:
        settings = self.settings
        formats = {name: (fmt, bits) for name, (fmt, bits) in self.folder.record("model")["formats_of_layers"].items()}
        pipeline = self._load()
        probe = self.reference.probes()[settings.family.component]
        errors = layer_errors(pipeline, probe, weight_errors, settings, self.console, formats)
        return [asdict(layer) for layer in errors]


def file_facts(recipe: FileRecipe, applied: Applied) -> dict[str, Any]:
    """What the report says of a model from a file, as `make_model` says it of one that was made here."""
    foreign = recipe.foreign
    layers = [layer for name, layer in foreign.layers.items() if not name.startswith(OTHER_PARTS)]
    weights = sum(torch.Size(layer.shape).numel() for layer in layers)
    of_backbone = [each for name, each in foreign.found.tensors.items() if not name.startswith(OTHER_PARTS)]
    stored = sum(tensor.end - tensor.begin for tensor in of_backbone)
    alone = len(of_backbone) == len(foreign.found.tensors)  # in a whole checkpoint, other parts are beside it
    return {
        "layers": len(applied.formats),
        "parameters": applied.elements,
        "quantized_weights": weights,
        "bits_per_quantized_weight": 8 * sum(layer.nbytes for layer in layers) / max(1, weights),
        "bits_per_weight": 8 * (stored + BYTES_IN_16_BIT * applied.missing) / applied.elements,
        "size_bytes": sum(path.stat().st_size for path in foreign.found.files) if alone else stored,
        "full_precision_bytes": BYTES_IN_16_BIT * applied.elements,
        "weight_errors": dict(applied.errors),
        "formats": dict(Counter(applied.formats.values())),
        "formats_of_layers": {name: [fmt, applied.bits[name]] for name, fmt in applied.formats.items()},
        "sha256": recipe.hashes,
    }
