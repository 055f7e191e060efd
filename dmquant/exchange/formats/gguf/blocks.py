"""Types of GGUF tensors that are written: weights to the bytes of their blocks (ggml-common.h, ggml-quants.c)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dmquant.exchange.formats.gguf.fitting import KBlocks, Symmetric, fit_k, of_halves, whole
from dmquant.formats.lookup import IQ4_NL as IQ4_NL_LEVELS

PART = 1 << 20  # weights fitted at once


class BlockType(NamedTuple):
    """A type of tensor: its number in ggml, weights and bytes of a block, bits a weight, and how blocks are made."""

    name: str
    number: int
    size: int
    nbytes: int
    encode: Callable[[Tensor, Tensor], Tensor]
    """Blocks (..., size) and what an error costs, which broadcasts to them, float32, to bytes (..., nbytes)."""
    stored: Callable[[Tensor], Tensor] | None = None
    """Whole levels, float32, to codes as the type has them, uint8, same shape; None for K-quants."""
    pack: Callable[[Tensor], Tensor] | None = None
    """Codes (..., size), uint8, to a block's bytes behind its scale; None for K-quants."""
    levels: tuple[float, float] = (0.0, 0.0)
    """The least and the largest level, where they are whole numbers in steps of 1."""

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.size


def quantize(weight: Tensor, cost: Tensor, kind: BlockType) -> Tensor:
    """Bytes (rows, bytes of a row) of a weight (rows, columns), float32; `cost` (columns,) is positive.

    The columns are whole blocks. A part of the rows at a time is fitted.
    """
    blocks, costs = weight.unflatten(1, (-1, kind.size)), cost.unflatten(0, (-1, kind.size))
    parts = blocks.split(max(1, PART // weight.shape[1]))
    return torch.cat([kind.encode(part.float(), costs).flatten(1) for part in parts])


def half_bytes(x: Tensor) -> Tensor:
    """Numbers of half precision (..., 1) as bytes (..., 2)."""
    return x.half().contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """The first half of the codes in the low nibbles, the second in the high ones; uint8 (..., n / 2)."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _with_fifths(codes: Tensor) -> Tensor:
    fifths = ((codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return torch.cat([fifths, _nibbles(codes & 15)], -1)


def _above(least: int) -> Callable[[Tensor], Tensor]:
    return lambda levels: (levels - least).to(torch.uint8)


def _signed(levels: Tensor) -> Tensor:
    return levels.to(torch.int8).view(torch.uint8)


def _one_scale(name: str, number: int, nbytes: int, grid: Symmetric, stored, pack, levels=(0.0, 0.0)) -> BlockType:
    def encode(blocks: Tensor, cost: Tensor) -> Tensor:
        scale, found = grid.fit(blocks, cost)
        return torch.cat([half_bytes(scale), pack(stored(found))], -1)

    return BlockType(name, number, 32, nbytes, encode, stored, pack, levels)


def _k_quants(top: int) -> Callable[[Tensor, Tensor], Tensor]:
    def encode(blocks: Tensor, cost: Tensor) -> Tensor:
        return _k_bytes(fit_k(blocks.unflatten(-1, (8, 32)), cost.unflatten(-1, (8, 32)), top), top)

    return encode


def _k_bytes(found: KBlocks, top: int) -> Tensor:
    codes = found.codes.to(torch.uint8)
    scales, minima = (one.squeeze(-1).to(torch.uint8) for one in (found.scales, found.minima))
    (low, high), (down, up) = scales.chunk(2, -1), minima.chunk(2, -1)
    whole = [low | high >> 4 << 6, down | up >> 4 << 6, high & 15 | (up & 15) << 4]
    pairs = codes.unflatten(-2, (4, 2))
    fours = (pairs[..., 0, :] & 15 | (pairs[..., 1, :] & 15) << 4).flatten(-2)
    fifths = []
    if top > 15:
        places = torch.arange(8, dtype=torch.uint8).view(8, 1)
        fifths = [((codes >> 4) << places).sum(-2, dtype=torch.uint8)]
    factors = [half_bytes(one.flatten(-2)) for one in (found.d, found.dmin)]
    return torch.cat([*factors, *whole, *fifths, fours], -1)


_FOUR, _FIVE = Symmetric(whole(-8, 7), (-8, 7)), Symmetric(whole(-16, 15), (-16, 15))
_EIGHT = Symmetric(whole(-127, 127), (127,), (1.0,))
_DENSER = Symmetric(of_halves(IQ4_NL_LEVELS.values), (-127, 113))

Q4_0 = _one_scale("Q4_0", 2, 18, _FOUR, _above(-8), _nibbles, (-8, 7))
Q5_0 = _one_scale("Q5_0", 6, 22, _FIVE, _above(-16), _with_fifths, (-16, 15))
Q8_0 = _one_scale("Q8_0", 8, 34, _EIGHT, _signed, lambda codes: codes, (-128, 127))
IQ4_NL = _one_scale("IQ4_NL", 20, 18, _DENSER, IQ4_NL_LEVELS.encode, _nibbles)
Q4_K = BlockType("Q4_K", 12, 256, 144, _k_quants(15))
Q5_K = BlockType("Q5_K", 13, 256, 176, _k_quants(31))

WRITTEN = {one.name.lower(): one for one in (Q4_0, IQ4_NL, Q4_K, Q5_0, Q5_K, Q8_0)}
"""By the names of the command line."""
