"""Write a model that dmquant saved as one file for ComfyUI: original names, layers of several formats side by side."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange import keys, tensor_file
from dmquant.exchange.formats.comfyui.layout import FLOAT_PRODUCT, RECIPE, Group, Layout
from dmquant.exchange.formats.comfyui.layouts import LAYOUTS
from dmquant.exchange.interfaces import Exported, Progress
from dmquant.exchange.keys import Target
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import DTYPES, Entry
from dmquant.layers import QuantLinear
from dmquant.qtensor import WeightSpec


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why ComfyUI cannot take a layer with weights and inputs of these specifications; None where it can."""
    if not isinstance(layer, nn.Linear):
        return "ComfyUI has quantized Linear layers alone"
    if (layout := layout_of(spec)) is None:
        listed = ", ".join(LAYOUTS)
        return f"ComfyUI has no weights in {spec.fmt.name}/{spec.granularity} with scales in {spec.store}, only {listed}"
    if reason := layout.misfit(tuple(layer.weight.shape), spec):
        return f"{reason}, which {layout.name} takes"
    if activations is None:
        return None if layout.float_product else f"ComfyUI rounds the inputs of {layout.name}, and here they are not"
    if activations not in layout.inputs:
        return f"ComfyUI does not round the inputs of {layout.name} as {activations}"
    return None


def layout_of(spec: WeightSpec) -> Layout | None:
    """The format that weights of this specification are in."""
    return next((layout for layout in LAYOUTS.values() if layout.holds(spec)), None)


def export(source: Source, path: Path, progress: Progress) -> Exported:
    """Write the file; UserError, before anything is written, for a layer that ComfyUI cannot take."""
    for name, layer in source.layers.items():
        _check(name, layer)
    names = [*source.rest, *(f"{name}.{part}" for name, layer in source.layers.items() for part in _float_parts(layer))]
    class_name = type(source.backbone).__name__
    targets = keys.original(class_name, source.config, names)
    entries: list[Entry] = []
    formats: Counter[str] = Counter()
    for target in targets or [Target(name, (name,)) for name in names]:
        group = _group(source, target)
        if group is None:
            entries.append(_plain(source, target))
        else:
            layout = _layout(group, class_name, targets is not None)
            formats[layout.name] += 1
            entries += [*layout.entries(group), _settings(layout, group)]
    tensor_file.write(path, entries, {}, progress)
    formats["high precision"] = _in_high_precision(source)
    note = f"names of tensors stay those of diffusers' {class_name}: ComfyUI itself has no loader for such a file"
    return Exported(path, formats, True, () if targets else (note,))
