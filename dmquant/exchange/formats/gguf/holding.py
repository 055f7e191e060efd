"""Layers whose codes a type of GGUF holds as they are, and their bytes."""

import torch
from torch import Tensor

from dmquant.exchange.formats.gguf import blocks
from dmquant.exchange.formats.gguf.blocks import BlockType
from dmquant.formats import Format, IntFormat, LookupFormat
from dmquant.grids import ScaledGrid
from dmquant.layers import QuantLinear
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec

BLOCK = 32
HOLDERS = (blocks.Q4_0, blocks.IQ4_NL, blocks.Q5_0, blocks.Q8_0)
_SIGNS = 0x88  # of two codes of 4 bits: two's complement becomes the distance from -8


def holder(layer: QuantLinear) -> BlockType | None:
    """The type whose levels are a layer's codes, each scale being for whole blocks of 32; None where there is none."""
    spec, size = layer.weight_spec, layer.weight_spec.granularity.size
    parts = spec.segments(layer.weight_shape)
    alone = len(parts) == 1 or (size is not None and parts[0] % size == 0)  # else a half has scales of its own
    return holder_of(spec) if alone and not layer.transforms and layer.in_features % BLOCK == 0 else None


def holder_of(spec: WeightSpec) -> BlockType | None:
    """The type whose levels are the codes of such weights; None where there is none."""
    if spec.grid_type is not ScaledGrid or (spec.granularity.size or BLOCK) % BLOCK:
        return None
    return next((kind for kind in HOLDERS if _step(spec.fmt, kind) is not None), None)


def holds(kind: BlockType, layer: QuantLinear) -> bool:
    """Whether a type has all levels that a layer's codes stand for, in blocks that its scales are for."""
    return holder(layer) is not None and _step(layer.weight_spec.fmt, kind) is not None


def _step(fmt: Format, kind: BlockType) -> float | None:
    """What a level of the type is in values of the format, if it has all of them."""
    if kind is blocks.IQ4_NL or isinstance(fmt, LookupFormat):
        return 1.0 if kind is blocks.IQ4_NL and fmt is blocks.IQ4_NL_LEVELS else None
    step = 1.0 if isinstance(fmt, IntFormat) else fmt.min_positive
    levels = fmt.values / step
    low, high = kind.levels
    inside = bool((levels == levels.round()).all()) and low <= float(levels.min()) and float(levels.max()) <= high
    return step if inside else None


def exactly(layer: QuantLinear, kind: BlockType) -> Tensor | None:
    """The bytes (rows, bytes of a row) of codes that the type `holds`; None for a scale that half precision rounds."""
    spec, step = layer.weight_spec, _step(layer.weight_spec.fmt, kind)
    rows, columns = layer.weight_shape
    body, filled = _body(layer.qweight, spec.fmt, step, kind, columns)
    scale = (layer.scales.decode() * step).expand(rows, -1)
    scale = scale.repeat_interleave(-(-(spec.granularity.size or columns) // BLOCK), 1)[:, : columns // BLOCK]
    scale = torch.where(filled, scale, 0.0)  # blocks of zeros have the smallest scale of all
    if not torch.equal(scale.half().float(), scale):
        return None
    return torch.cat([blocks.half_bytes(scale.unsqueeze(-1)), body], -1).flatten(1)


def _body(packed: Tensor, fmt: Format, step: float, kind: BlockType, columns: int) -> tuple[Tensor, Tensor]:
    """Bytes behind the scales (rows, blocks, n), and which blocks hold anything but zeros (rows, blocks)."""
    if fmt.bits == 4 and kind in (blocks.Q4_0, blocks.IQ4_NL):
        pairs = packed.view(len(packed), -1, BLOCK // 2)  # byte by byte: to take them apart takes ten times as long
        first, second = pairs.chunk(2, -1)
        body = torch.stack([first & 15 | second << 4, first >> 4 | second & 240], -1).flatten(-2)
        if kind is blocks.Q4_0:
            return body.bitwise_xor_(_SIGNS), _any(pairs)
        return body, torch.ones((), dtype=torch.bool)
    codes = unpack(packed, fmt.bits, columns).unflatten(1, (-1, BLOCK))
    if fmt.bits == 8:
        return codes, _any(codes)
    every = torch.arange(2**fmt.bits, dtype=torch.uint8)
    stored = kind.stored(fmt.decode(every) / step)
    codes = stored[codes.int()]
    return kind.pack(codes), (codes != kind.stored(torch.zeros((), dtype=torch.float32))).any(-1)


def _any(octets: Tensor) -> Tensor:
    """Which rows of bytes (..., 8 n) hold anything but zeros."""
    return octets.contiguous().view(torch.int64).ne(0).any(-1)
