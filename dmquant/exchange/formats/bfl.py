"""diffusers' own `bfl` layers: NVFP4 with a calibrated `input_scale`, FP8 with a scale for each row.

diffusers 0.42, quantizers/bfl: it reads them by `from_single_file`, by names of its own models. Files that Black Forest
Labs released are in ComfyUI's dialect instead, high nibble first and with swizzled scales.
"""

from pathlib import Path

import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange import folder, named_scales
from dmquant.exchange.interfaces import Exported, Foreign, ForeignFormat, Found, Progress
from dmquant.exchange.layers import (
    block_format,
    check,
    check_class,
    check_pair,
    counted,
    input_notes,
    kind_of,
    unquantized,
)
from dmquant.exchange.source import Source
from dmquant.qtensor import WeightSpec

NAME = "bfl"
KINDS = {("nvfp4", "static nvfp4"): "nvfp4", ("fp8_e4m3", "fp8_e4m3 a token"): "fp8r", ("fp8_e4m3", None): "fp8r"}
USAGE = """
import torch
from diffusers import {kind}, BFLQuantizationConfig, DiffusionPipeline

folder, dtype = "path/to/this/folder", torch.bfloat16
backbone = {kind}.from_single_file(
    f"{{folder}}/{component}/diffusion_pytorch_model.safetensors",
    config=folder,
    subfolder="{component}",
    quantization_config=BFLQuantizationConfig(compute_dtype=dtype),
    dtype=dtype,
)
pipe = DiffusionPipeline.from_pretrained(folder, {component}=backbone, dtype=dtype)
"""


def _weights(spec: WeightSpec) -> str | None:
    return block_format(spec) or (spec.fmt.name if spec.granularity.kind == "channel" else None)


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why no `bfl` layer can hold a layer in these formats; None where one can."""
    taken = [inputs for weights, inputs in KINDS if weights == _weights(spec)]
    return check_pair(spec, activations, taken) or check_class(layer, spec.granularity.size or 1)


def export(source: Source, out: Path, progress: Progress) -> Exported:
    """Write a pipeline folder with such layers in one file; UserError for a layer that they cannot hold."""
    check(source, NAME, refuses)
    kinds = {name: KINDS[_weights(one.weight_spec), kind_of(one.activations)] for name, one in source.layers.items()}
    entries = unquantized(source)
    for name, kind in kinds.items():
        if kind == "fp8r":
            entries += named_scales.bytewise(source, name, torch.float8_e4m3fn)
        else:
            entries += [*named_scales.nvfp4(source, name), named_scales.static_input(source, name)]
    backbone = type(source.backbone)
    usage = USAGE.format(kind=backbone.__name__, component=source.component)
    target = folder.Folder(NAME, "diffusers' bfl layers", entries, None, usage, in_one_file=True)
    folder.write(source, out, target, progress)
    notes = ("diffusers loads it by from_single_file with a BFLQuantizationConfig: README.md there has the lines",)
    if not hasattr(backbone, "from_single_file"):
        notes = (f"diffusers {backbone.__name__} has no from_single_file, by which alone it loads such files",)
    return Exported(out, counted(source, kinds.values()), exact=True, notes=notes + input_notes(source, NAME))


def recognises(found: Found) -> bool:
    """Whether the layers with scales are such as `bfl` layers read, in a file or folder that names no other format."""
    layers = named_scales.names(found)
    named = found.config.get("quantization_config") or any(name.endswith(".comfy_quant") for name in found.tensors)
    return (
        bool(layers)
        and not named
        and "_quantization_metadata" not in found.metadata
        and all(_is_layer(found, name) for name in layers)
    )


def _is_layer(found: Found, name: str) -> bool:
    """Whether a layer's tensors have the names, dtypes and shapes of one of the two kinds."""
    weight, scale = (found.tensors.get(f"{name}.{one}") for one in (named_scales.WEIGHT, named_scales.SCALE))
    if weight is None or len(weight.shape) != 2:
        return False
    rows, columns = weight.shape
    if weight.dtype == "F8_E4M3":
        return scale.dtype == "F32" and scale.shape == (rows,)
    has_both = all(f"{name}.{one}" in found.tensors for one in (named_scales.BASE, named_scales.INPUT))
    return weight.dtype == "U8" and scale.dtype == "F8_E4M3" and scale.shape == (rows, columns // 8) and has_both


def read(found: Found) -> Foreign:
    """Open such a file; UserError for layers whose tensors do not go together."""
    layers = {name: named_scales.read(found, name, NAME) for name in named_scales.names(found)}
    if not layers:
        raise UserError(f"{found.path} has no layers with weight_scale")
    parts = {f"{name}.{one}" for name in layers for one in named_scales.PARTS}
    rest = tuple(name for name in found.tensors if name not in parts)
    return Foreign(FORMAT, found, {"nibbles": "low first", "block scales": "linear"}, layers, rest)


FORMAT = ForeignFormat(NAME, "bfl layers in diffusers", recognises, read, export, folder=True, refuses=refuses)
