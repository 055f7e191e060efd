"""Write a model that dmquant saved as one file for ComfyUI: original names, layers of several formats side by side."""

import fnmatch
import json
from pathlib import Path

import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.formats.comfyui.layout import FLOAT_PRODUCT, RECIPE, Group, Layout
from dmquant.exchange.formats.comfyui.layouts import LAYOUTS, layout_of
from dmquant.exchange.interfaces import Exported, Progress
from dmquant.exchange.keys import Target, targets_of
from dmquant.exchange.layers import counted, described
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import DTYPES, Entry
from dmquant.layers import QuantLinear
from dmquant.qtensor import WeightSpec

MEASURED = {
    "UNet2DConditionModel": ("down_blocks.*.attn2.to_k", "add_embedding.linear_1"),
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1"),
    "SD3Transformer2DModel": ("context_embedder", "time_text_embed.text_embedder.linear_1"),
}
"""Layers from whose stored shape ComfyUI tells a model's widths (comfy/model_detection.py), the first of each name: two
codes a byte would halve it."""


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why ComfyUI cannot take a layer with weights and inputs of these specifications; None where it can."""
    if not isinstance(layer, nn.Linear):
        return f"is a {type(layer).__name__.removeprefix('Quant')}, and linear layers alone are taken"
    if (layout := layout_of(spec)) is None:
        return f"is in {described(spec)}, which is none of {', '.join(LAYOUTS)}"
    if reason := layout.misfit(tuple(layer.weight.shape), spec):
        return reason
    if activations is None and not layout.float_product:
        return f"leaves its input as it is, and {layout.name} rounds it"
    if activations is not None and activations not in layout.inputs:
        return f"rounds its input to {activations}, and {layout.name} does not"
    return None


def refuses_in(model: nn.Module, name: str, spec: WeightSpec) -> str | None:
    """Why ComfyUI cannot take the layer of this name of a backbone in these weights; None where `refuses` decides."""
    layout = layout_of(spec)
    if layout is None or not layout.packed or not _is_measured(model, name):
        return None
    return "tells ComfyUI how wide the model is, which two codes a byte would halve"


def export(source: Source, path: Path, progress: Progress) -> Exported:
    """Write the file; UserError, before anything is written, for a layer that ComfyUI cannot take."""
    targets, are_original = targets_of(source)
    for name in source.layers:
        _check(source, name)
    entries: list[Entry] = []
    kinds: list[str] = []
    for target in targets:
        if (group := _group(source, target)) is None:
            entries.append(_plain(source, target))
        else:
            layout = layout_of(group.first.weight_spec)
            kinds += [layout.name] * len(group.names)
            entries += [*layout.entries(group), _settings(layout, group)]
    tensor_file.write(path, entries, {}, progress)
    kind = type(source.backbone).__name__
    note = f"tensors keep the names of diffusers' {kind}, since ComfyUI's own are not known here"
    return Exported(path, counted(source, kinds), True, () if are_original else (note,))


def _is_measured(model: nn.Module, name: str) -> bool:
    """Whether the layer is the first of a backbone that matches a glob of its class."""
    globs = [glob for glob in MEASURED.get(type(model).__name__, ()) if fnmatch.fnmatchcase(name, glob)]
    names = [each for each, _ in model.named_modules()] if globs else []
    return any(name == fnmatch.filter(names, glob)[0] for glob in globs)


def _check(source: Source, name: str) -> None:
    """UserError, naming layer, reason and recipe, for a layer that ComfyUI cannot take."""
    layer = source.layers[name]
    why = refuses(layer, layer.weight_spec, layer.activations)
    if why is None:
        why = layout_of(layer.weight_spec).unfit_transforms(layer.transforms)
    why = why or refuses_in(source.backbone, name, layer.weight_spec)
    if why:
        raise UserError(f"ComfyUI cannot take {name}: it {why}; {RECIPE}")


def _group(source: Source, target: Target) -> Group | None:
    """The quantized layers whose weights are this tensor; None for another tensor. UserError where they differ."""
    layers = [source.layers.get(name.removesuffix(".weight")) for name in target.sources if name.endswith(".weight")]
    if not any(layers):
        return None
    group = Group(target.name.removesuffix(".weight"), source, target)
    alike = all(layers) and len({_kind(one) for one in layers}) == 1
    if not alike:
        raise UserError(
            f"ComfyUI has {', '.join(group.names)} as one layer, but they are quantized differently; {RECIPE}"
        )
    return group


def _kind(layer: QuantLinear) -> tuple:
    """What layers that are one in ComfyUI have in common."""
    transforms = tuple((one.name, repr(one.options)) for one in layer.transforms)
    return layer.weight_spec, layer.activations, transforms, layer.weight_shape[1]


def _plain(source: Source, target: Target) -> Entry:
    """A tensor that is not quantized, as it is stored."""
    headers = [source.header(name) for name in target.sources]
    rows = sum(header.shape[0] for header in headers)
    shape = headers[0].shape if len(headers) == 1 else (rows, *headers[0].shape[1:])
    return Entry(
        target.name,
        DTYPES[headers[0].dtype],
        shape,
        lambda: target.rows([source.tensor(name) for name in target.sources]),
    )


def _settings(layout: Layout, group: Group) -> Entry:
    """The tensor that says what format a layer is in: JSON in bytes."""
    settings = {"format": layout.name, **layout.settings(group)}
    if group.first.activations is None:
        settings[FLOAT_PRODUCT] = True
    text = json.dumps(settings, separators=(",", ":")).encode()
    return tensor_file.stored(f"{group.name}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8))
