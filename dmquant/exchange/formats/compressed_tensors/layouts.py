"""The layouts of compressed-tensors 0.20 in which our layers fit: their tensors, and what the configuration says.

Schemes as its presets have them (quantization/quant_scheme.py), tensors as its compressors name them (compressors/).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.exchange.layers import (
    block_format,
    bytes_of,
    check_class,
    check_pair,
    float_scale,
    kind_of,
    kind_of_weights,
)
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Entry
from dmquant.formats import IntFormat, get_format
from dmquant.packing import pack, packed_size, unpack
from dmquant.qtensor import WeightSpec

E4M3 = "torch.float8_e4m3fn"


def args(bits: int, kind: str, strategy: str, dynamic: bool | str = False, **more: Any) -> dict[str, Any]:
    """What the configuration says of weights or inputs."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic, **more}


BLOCKS = {
    "nvfp4": args(4, "float", "tensor_group", group_size=16, scale_dtype=E4M3),
    "mxfp4": args(4, "float", "group", group_size=32, scale_dtype="torch.uint8"),
    "mxfp8": args(8, "float", "group", group_size=32, scale_dtype="torch.uint8"),
}
FORMATS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
INPUTS = {
    "static nvfp4": args(4, "float", "tensor_group", "local", group_size=16, scale_dtype=E4M3),
    "mxfp4": {**BLOCKS["mxfp4"], "dynamic": True},
    "mxfp8": {**BLOCKS["mxfp8"], "dynamic": True},
    "fp8_e4m3 a token": args(8, "float", "token", True),
    "static fp8_e4m3 a tensor": args(8, "float", "tensor"),
    "int8 a token": args(8, "int", "token", True),
}
TAKEN = {
    "nvfp4": (None, "static nvfp4"),
    "mxfp4": (None, "mxfp4"),
    "mxfp8": (None, "mxfp8"),
    "fp8_e4m3 a channel": ("fp8_e4m3 a token",),
    "fp8_e4m3 a tensor": ("static fp8_e4m3 a tensor",),
    "int8 a channel": (None, "int8 a token"),
}
"""The inputs by which weights are multiplied; integers of other kinds are not multiplied by rounded ones."""


@dataclass(frozen=True)
class Layout:
    """A layer as compressed-tensors has it."""

    format: str
    scheme: Mapping[str, Any]
    entries: list[Entry]


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why compressed-tensors cannot hold a layer in these formats; None where it can."""
    whole = isinstance(spec.fmt, IntFormat) and spec.granularity.kind != "tensor"
    taken = TAKEN.get(kind_of_weights(spec), (None,) if whole else ())
    return check_pair(spec, activations, taken) or check_class(layer, spec.granularity.size or 1)


def layout(source: Source, name: str) -> Layout:
    """A layer as compressed-tensors has it; for one that `refuses` has no word against."""
    layer = source.layers[name]
    spec, given = layer.weight_spec, kind_of(layer.activations)
    kind, block = kind_of_weights(spec), block_format(spec)
    if block:
        scheme, format = BLOCKS[block], FORMATS[block]
        entries = _blocks(source, name, block)
    elif kind.startswith("fp8"):
        strategy = spec.granularity.kind
        scheme, format = args(8, "float", strategy), "float-quantized"
        entries = _bytes(source, name, torch.float8_e4m3fn)
    elif given:
        scheme, format = args(8, "int", "channel"), "int-quantized"
        entries = _bytes(source, name, torch.int8)
    else:
        size = {"group_size": spec.granularity.size} if spec.granularity.size else {}
        scheme = args(spec.fmt.bits, "int", spec.granularity.kind, **size)
        format, entries = "pack-quantized", _packed(source, name)
    if layer.is_static:
        entries.append(_static(source, name, block))
    return Layout(format, {"weights": scheme, "input_activations": INPUTS.get(given)}, entries)


def reciprocal(base: Tensor) -> Tensor:
    """What scales of blocks are divided by in place of multiplied by `base`: the float32 that errs at fewest scales.

    `base` is one float32; 1 / base is rounded, and one of its neighbours may bring back more of the products.
    """
    first = (1 / base.double()).float()
    tried = [first, *(torch.nextafter(first, first * factor) for factor in (0, 2))]
    return min(tried, key=lambda inverse: _differing(base, inverse))


def is_exact(base: Tensor) -> bool:
    """Whether dividing by the reciprocal gives, for every scale of a block, what multiplying by `base` gives."""
    return _differing(base, reciprocal(base)) == 0


def _differing(base: Tensor, inverse: Tensor) -> int:
    values = get_format("fp8_e4m3").values
    return int((values / inverse != values * base).sum())


def _blocks(source: Source, name: str, block: str) -> list[Entry]:
    rows, columns = source.layers[name].weight_shape
    wide = block == "mxfp8"
    dtype = torch.float8_e4m3fn if wide else torch.uint8
    of_scale = torch.float8_e4m3fn if block == "nvfp4" else torch.uint8
    shape = source.layers[name].weight_spec.scale_shape((rows, columns))
    codes = bytes_of(source, f"{name}.qweight", dtype)
    entries = [
        Entry(
            f"{name}.weight" if wide else f"{name}.weight_packed", dtype, (rows, columns // (1 if wide else 2)), codes
        ),
        Entry(f"{name}.weight_scale", of_scale, shape, bytes_of(source, f"{name}.scale", of_scale)),
    ]
    if block == "nvfp4":
        base = bytes_of(source, f"{name}.scale_base", torch.float32)
        inverse = Entry(f"{name}.weight_global_scale", torch.float32, (1,), lambda: reciprocal(base().reshape(1)))
        entries.append(inverse)
    return entries


def _bytes(source: Source, name: str, dtype: torch.dtype) -> list[Entry]:
    layer = source.layers[name]
    shape = (1,) if layer.weight_spec.granularity.kind == "tensor" else (layer.weight_shape[0], 1)
    scale = float_scale(source, name)
    return [
        Entry(f"{name}.weight", dtype, layer.weight_shape, bytes_of(source, f"{name}.qweight", dtype)),
        Entry(f"{name}.weight_scale", torch.float32, shape, lambda: scale().reshape(shape)),
    ]


def _packed(source: Source, name: str) -> list[Entry]:
    """Integers in a little-endian stream of bits as ours, counted from the smallest, in rows of whole words."""
    layer = source.layers[name]
    bits, (rows, columns) = layer.weight_spec.fmt.bits, layer.weight_shape
    words = -(-columns * bits // 32)

    def make() -> Tensor:
        codes = unpack(source.tensor(f"{name}.qweight"), bits, columns) ^ (1 << bits - 1)
        padded = torch.zeros(rows, words * 4, dtype=torch.uint8)
        padded[:, : packed_size(columns, bits)] = pack(codes, bits)
        return padded.view(torch.int32)

    shape = layer.weight_spec.scale_shape(layer.weight_shape)
    return [
        Entry(f"{name}.weight_packed", torch.int32, (rows, words), make),
        Entry(f"{name}.weight_scale", torch.float32, shape, float_scale(source, name)),
        Entry(f"{name}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns])),
    ]


def _static(source: Source, name: str, block: str | None) -> Entry:
    """`input_scale`, or of inputs in blocks what their scales are divided by."""
    scale = bytes_of(source, f"{name}.input_scale", torch.float32)
    if not block:
        return Entry(f"{name}.input_scale", torch.float32, (1,), lambda: scale().reshape(1))
    return Entry(f"{name}.input_global_scale", torch.float32, (1,), lambda: (1 / scale().double()).float().reshape(1))
