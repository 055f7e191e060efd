"""The ways in which the tensors of a quantized layer can be read: dialects that look alike and mean other numbers.

Engines agree on codes and scales of NVFP4, MXFP8, FP8 and INT8, and differ in which element of a byte comes first, in
the order of the block scales, and in whether weights are multiplied or divided by a scale. Files that were written in
one dialect and are read in another give white images or noise.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dmquant.exchange.decoding import e2m1, swapped_nibbles
from dmquant.exchange.interfaces import Found
from dmquant.gpu.blocked import from_blocked, in_tiles
from dmquant.host import weight_file

CODES = ("weight", "weight_packed", "_weight_qdata", "qdata")
SCALES = ("weight_scale", "_weight_scale", "scale")
GLOBALS = ("weight_scale_2", "weight_global_scale", "_weight_per_tensor_scale", "per_tensor_scale")
"""Names of the parts of a layer in the formats that are read here."""
FOUR_BITS, BYTES, BLOCK_SCALES = ("U8", "I8"), ("F8_E4M3", "F8_E5M2", "I8"), ("F8_E4M3", "F8_E8M0", "U8")


class Reading(NamedTuple):
    """A way to read a layer; None where it makes no difference to these tensors."""

    nibbles: str | None = None
    scales: str | None = None
    globals: str | None = None

    def __str__(self) -> str:
        named = (("nibbles", self.nibbles), ("block scales", self.scales), ("scales", self.globals))
        return ", ".join(f"{what} {how}" for what, how in named if how is not None)


def readings(found: Found, name: str, shape: tuple[int, ...]) -> Mapping[Reading, Callable[[], Tensor]]:
    """Every way to read the linear layer `name`, and what decodes its weight so, float32 of `shape`, when called.

    Empty for layers of other layouts. Headers alone decide which ways there are.
    """
    codes, scales, overall = (_part(found, name, names) for names in (CODES, SCALES, GLOBALS))
    if len(shape) != 2 or codes is None or scales is None:
        return {}
    held, scaled = found.tensors[codes], found.tensors[scales]
    packed = held.dtype in FOUR_BITS and held.shape == (shape[0], shape[1] // 2)
    if not packed and not (held.dtype in BYTES and held.shape == shape):
        return {}
    if packed and scaled.dtype not in BLOCK_SCALES:
        return {}
    orders = list(_orders(scaled, shape)) if scaled.dtype in BLOCK_SCALES else [None]
    one_scale = overall is not None or orders == [None]
    ways = itertools.product(
        ("low first", "high first") if packed else (None,),
        orders,
        ("multiplied", "divided") if one_scale else (None,),
    )
    return {way: _decoder(found, way, codes, scales, overall, shape) for way in itertools.starmap(Reading, ways)}


def _part(found: Found, name: str, parts: tuple[str, ...]) -> str | None:
    return next((full for part in parts if (full := f"{name}.{part}") in found.tensors), None)


def _orders(scales: weight_file.Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    """The orders that block scales of this size can have: one if they are padded, both if they are whole tiles."""
    count, (rows, columns) = torch.Size(scales.shape).numel(), shape
    for group in (16, 32):
        across = columns // group
        if columns % group == 0 and count == rows * across:
            yield "linear"
            if in_tiles(rows, across) == (rows, across):
                yield "swizzled"
            return
        if columns % group == 0 and count == math.prod(in_tiles(rows, across)):
            yield "swizzled"
            return


def _decoder(
    found: Found, way: Reading, codes: str, scales: str, overall: str | None, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def decode() -> Tensor:
        values, scale = _values(found.tensor(codes), way, shape), found.tensor(scales)
        if way.scales is not None:
            scale = _blocks(scale, way, shape)
        factor = torch.ones((), dtype=torch.float32) if overall is None else found.tensor(overall).float().reshape(())
        if way.scales is None:
            scale, factor = torch.ones((), dtype=torch.float32), scale.float().reshape(-1, 1) * factor
        return values * (scale / factor if way.globals == "divided" else scale * factor)

    return decode


def _values(codes: Tensor, way: Reading, shape: tuple[int, ...]) -> Tensor:
    if way.nibbles is None:
        return codes.float()
    octets = codes.view(torch.uint8)
    if way.nibbles == "high first":
        octets = swapped_nibbles(octets)
    return e2m1(octets)


def _blocks(scale: Tensor, way: Reading, shape: tuple[int, ...]) -> Tensor:
    """Block scales in the order of the weights, float32 of `shape`."""
    rows, columns = shape
    group = 16 if scale.numel() >= rows * (columns // 16) else 32
    octets = scale.contiguous().view(torch.uint8).flatten()
    if way.scales == "swizzled":
        octets = from_blocked(octets, rows, columns // group)
    stored = octets.reshape(rows, columns // group)
    exponents = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    decoded = torch.exp2(stored.float() - 127) if exponents else stored.view(scale.dtype).float()
    return decoded.repeat_interleave(group, 1)
