"""The stage that makes a quantized model: quantize a loaded pipeline, save it whole, load it as any app would."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
from torch import nn

from dmquant.convert import LayerReport, component_names, of_backbone, quantize_layers_, unmatched
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.errors import UserError
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.hashes import sha256_once
from dmquant.host.units import size_text
from dmquant.matching import as_list
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.attention import check_attention
from dmquant.pipelines.models.checksums import checked
from dmquant.pipelines.models.hashes import pipeline_hashes
from dmquant.pipelines.models.loading import checked_quantized, explained, load_full_precision
from dmquant.pipelines.models.placing import GROUP, MODEL, end_offloading, place, place_backbone_alone
from dmquant.pipelines.models.saving import model_card, narrow_exactly, save_whole
from dmquant.pipelines.models.shared_parts import SharedParts
from dmquant.pipelines.runs.calibration import calibrate_all, calibration_data
from dmquant.pipelines.runs.components import BYTES_IN_16_BIT, check_components, quantize_components
from dmquant.pipelines.runs.footprint import footprint, remainder
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def make_model_together(
    load: Callable[[], "DiffusionPipeline"],
    settings: Settings,
    folder: Path,
    console: Console,
    workspace: Path,
    weights: str,
    shared: SharedParts | None = None,
) -> dict[str, Any]:
    """`make_model` by the main process, with the data that it learns from captured by all."""

    def work() -> dict[str, Any] | None:
        if everyone.is_main:
            return make_model(load(), settings, folder, console, workspace, weights, shared)
        if settings.recipe.calibrated:
            pipeline = load()
            for name in to_quantize(pipeline, settings):
                calibration_data(pipeline, settings.for_backbone(name), workspace, console, weights)
        return None

    everyone = processes.current()
    return everyone.together(work)[0]


def make_model(
    pipeline: "DiffusionPipeline",
    settings: Settings,
    folder: Path,
    console: Console,
    workspace: Path,
    weights: str,
    shared: SharedParts | None = None,
) -> dict[str, Any]:
    """Quantize the backbones of a full-precision pipeline, whose key is `weights`, in place; save it whole to `folder`.

    `workspace` is where a recipe that takes data keeps it, and the codes of finished blocks; `shared` has the parts
    that are saved once for several models. Returns what the report says of the model: number of layers and parameters,
    bits and bytes, formats, seconds, and file hashes. Bits over all and bytes in full precision count what the file
    holds: parameters, and buffers that are saved with them.
    """
    backbones = to_quantize(pipeline, settings)
    backbone = nn.ModuleList(backbones.values())
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    elements = sum(tensor.numel() for tensor in backbone.state_dict().values())
    check_components(pipeline, settings.recipe)
    began = time.perf_counter()
    reports = quantize_in_place(pipeline, settings, workspace, console, weights)
    for name, layers in reports.items():
        for note, names in _notes(backbones[name], layers).items():
            _say_of(console, names, note)
    layers = [layer for of_one in reports.values() for layer in of_one]
    components = quantize_components(pipeline, settings.recipe, console, narrow_exactly)
    narrow_exactly(backbone)
    size, stored = footprint(backbone), sum(tensor.nbytes for tensor in backbone.state_dict().values())
    kind = type(pipeline).__name__
    loras = [lora.describe() for lora in settings.model.loras]
    card = model_card(settings.model.name, settings.recipe.name, *settings.formats, kind, settings.dtype, loras)
    if replaced := save_whole(pipeline, folder, card, list(backbones), shared):
        console.say(
            f"note: the model that was in {folder} has no checksums, so that it was not removed: it is {replaced}"
        )
    seconds = time.perf_counter() - began
    files = [path for name in backbones for path in (folder / name).glob("*.safetensors")]
    facts = {
        "layers": len(layers),
        "parameters": parameters,
        "quantized_weights": size.quantized_weights,
        "bits_per_quantized_weight": size.bits_per_weight,
        "bits_per_weight": 8 * stored / elements,
        "size_bytes": sum(path.stat().st_size for path in files),
        "full_precision_bytes": BYTES_IN_16_BIT * elements,
        "weight_errors": {
            settings.for_backbone(name).family.prefix + layer.plan.name: layer.error
            for name, of_one in reports.items()
            for layer in of_one
        },
        "formats": dict(Counter(layer.plan.weights.fmt.name for layer in layers)),
        "seconds": seconds,
        "components": components,
        **_hashes(folder, list(backbones)),
    }
    console.say(
        f"model: {facts['layers']} layers, {facts['bits_per_quantized_weight']:.2f} bits a quantized weight, "
        f"{facts['bits_per_weight']:.2f} over all; {size_text(facts['size_bytes'])} "
        f"({size_text(facts['full_precision_bytes'])} in 16 bit), in {seconds:.1f} s"
    )
    return facts


def to_quantize(pipeline: "DiffusionPipeline", settings: Settings) -> dict[str, nn.Module]:
    """The backbones, by name, that the recipe is for: further ones may have rules of their own, as other parts have."""
    others = component_names(settings.recipe)
    return {name: each for name, each in settings.family.backbones_of(pipeline).items() if name not in others}


def quantize_in_place(
    pipeline: "DiffusionPipeline", settings: Settings, workspace: Path, console: Console, weights: str
) -> dict[str, list[LayerReport]]:
    """Quantize the backbones of a full-precision pipeline, whose key is `weights`, in place, as `make_model` says."""
    backbones = to_quantize(pipeline, settings)
    if warning := unmatched(next(iter(backbones.values())), settings.recipe):  # all are of one architecture
        console.say(f"warning: {warning}")
    each = {
        name: replace(settings.for_backbone(name), recipe=of_backbone(settings.recipe_for(backbone)))
        for name, backbone in backbones.items()
    }
    for rule in each[settings.family.component].recipe.rules:
        if rule.keep and rule.reason:
            _say_of(console, as_list(rule.match), f"in high precision, since it {rule.reason}")
    if settings.recipe.calibrated:
        calibrated = calibrate_all(pipeline, list(each.values()), workspace, console, weights)
        done = {name: (one.layers, one.recipe) for name, one in zip(each, calibrated, strict=True)}
    else:
        if settings.offload == GROUP:
            # Without data a layer at a time is looked at, which host memory is good enough for.
            end_offloading(pipeline)
        done = {}
        for name, backbone in backbones.items():
            if settings.offload == MODEL:
                place_backbone_alone(pipeline, name, settings.device)
            recipe = each[name].recipe
            with console.bar("quantizing") as bar:
                layers = quantize_layers_(backbone, recipe, lambda at, total, layer, bar=bar: bar(at, total))
            done[name] = layers, recipe
    for name, (_, recipe) in done.items():
        mark_quantized(backbones[name], recipe)
    return {name: layers for name, (layers, _) in done.items()}


def _say_of(console: Console, names: Sequence[str], note: str) -> None:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    console.say(f"note: {names[0]}{others}: {note}")


def _notes(backbone: nn.Module, layers: Sequence[LayerReport]) -> dict[str, list[str]]:
    """The layers that each note is about."""
    notes: dict[str, list[str]] = {}
    for layer in layers:
        if note := remainder(backbone.get_submodule(layer.plan.name)):
            notes.setdefault(note, []).append(layer.plan.name)
    return notes


def load_source(
    settings: Settings, console: Console, parts: Mapping[str, Any] = MappingProxyType({})
) -> "DiffusionPipeline":
    """The full-precision pipeline of a run, on its device; `parts` are in memory already and not loaded again.

    Unless LoRAs are fused into it: they may be in these parts already, which are those of a quantized pipeline.
    """
    parts = {} if settings.model.loras else parts
    return load_full_precision(
        settings.model, settings.dtype, settings.device, console.say, parts, offload=settings.offload
    )


def load_quantized(folder: Path, settings: Settings, **parts: Any) -> "DiffusionPipeline":
    """A pipeline that dmquant saved, as any diffusers app loads it, on the device of the run.

    `parts` are in memory already and not loaded again. Raises UserError for a folder that is not whole, and for an
    attention backend that is not installed.
    """
    checked_quantized(folder, parts)
    kind = getattr(diffusers, folders.pipeline_class(folder)) if parts else diffusers.DiffusionPipeline
    with checked(folder, parts), explained(folder):
        pipeline = kind.from_pretrained(folder, dtype=settings.dtype, local_files_only=True, **parts)
    for backbone in settings.family.backbones_of(pipeline).values():
        check_attention(backbone)
    return place(pipeline, settings.device, settings.offload)


def is_as_written(folder: Path, sha256: dict[str, str]) -> bool:
    """Whether a pipeline folder is whole, and the files named have the hashes that they were written with."""
    try:
        folders.check_whole(folder)
        return all(sha256_once(folder / name) == digest for name, digest in sha256.items())
    except (UserError, OSError):
        return False


def _hashes(folder: Path, backbones: Sequence[str]) -> dict[str, dict[str, str]]:
    """SHA-256 of the files of a model folder, with the parts other than the backbones by themselves."""
    hashes = pipeline_hashes(folder)
    places = tuple(f"{name}/" for name in backbones)
    of_backbone = {name for name in hashes if name.endswith(".json") or name.startswith(places)}
    return {
        "sha256": {name: digest for name, digest in hashes.items() if name in of_backbone},
        "parts_sha256": {name: digest for name, digest in hashes.items() if name not in of_backbone},
    }
