"""The order in which Nunchaku's kernels read weights, scales, vectors and branches: that of the registers of an MMA.

deepcompressor, backend/nunchaku/utils.py (NunchakuWeightPacker); PTX ISA, mma.m16n8k64 and mma.m16n8k16. The 32 lanes
of a warp are 8 by 4, and each holds neighbouring columns in a register of 32 bits. Every order is a permutation of
dimensions, here with its inverse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Rows and columns of a weight are multiples of this."""
RANKS = 16
"""A branch's rank is a multiple of this."""


@dataclass(frozen=True)
class Order:
    """A permutation of the elements of a matrix: dimensions are split into `sides`, which are put in `order`."""

    sides: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The elements of `x` as stored, in one dimension; any dtype."""
        return x.reshape(self.sides).permute(self.order).flatten()

    def undo(self, stored: Tensor) -> Tensor:
        """The elements in the order of a matrix, in one dimension; any dtype."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.reshape([self.sides[side] for side in self.order]).permute(back).flatten()


def _of_weight(rows: int, columns: int) -> Order:
    """Lanes hold 8 columns of 2 rows that are 8 apart, twice, 32 columns apart."""
    return Order((rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))


def _of_rows(rows: int, groups: int) -> Order:
    """Scales in 16 bits and vectors: lanes hold 2 neighbouring rows, and the 2 that are 8 further."""
    return Order((rows // TILE, 8, 2, 4, 2, groups), (0, 5, 1, 3, 2, 4))


def _of_small_scales(rows: int, groups: int) -> Order:
    """Scales in E4M3: lanes hold 4 groups of 4 rows that are 32 apart."""
    return Order((rows // TILE, 4, 4, 8, groups // 4, 4), (0, 4, 3, 2, 1, 5))


def _of_down(rank: int, columns: int) -> Order:
    """A branch's first matrix, (rank, columns), in tiles of 16 by 16."""
    return Order((rank // 16, 2, 8, columns // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6))


def _of_up(rows: int, rank: int) -> Order:
    """A branch's second matrix, (rows, rank), in tiles of 16 by 16."""
    return Order((rows // 16, 2, 8, rank // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6))


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 (rows, columns), to int8 (rows, columns / 2); the first of 8 fills the lowest bits."""
    first, second = _of_weight(*codes.shape).apply(codes).unflatten(0, (-1, 2)).unbind(1)
    return (first | second << 4).view(torch.int8).view(len(codes), -1)


def unpack_codes(packed: Tensor) -> Tensor:
    """Undo `pack_codes`."""
    rows, columns = len(packed), 2 * packed.shape[1]
    octets = packed.contiguous().view(torch.uint8).flatten()
    return _of_weight(rows, columns).undo(torch.stack([octets & 15, octets >> 4], 1)).view(rows, columns)


def pack_scales(scales: Tensor) -> Tensor:
    """Scales (rows, groups), of 16 bits or in E4M3, to (groups, rows), which is their shape by name alone."""
    order = (_of_small_scales if scales.dtype.itemsize == 1 else _of_rows)(*scales.shape)
    return (
        order.apply(scales.view(torch.uint8) if scales.dtype.itemsize == 1 else scales)
        .view(scales.dtype)
        .view(scales.shape[::-1])
    )


def unpack_scales(stored: Tensor) -> Tensor:
    """Undo `pack_scales`."""
    groups, rows = stored.shape
    order = (_of_small_scales if stored.dtype.itemsize == 1 else _of_rows)(rows, groups)
    flat = stored.contiguous().view(torch.uint8) if stored.dtype.itemsize == 1 else stored
    return order.undo(flat).view(stored.dtype).view(rows, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """A bias, a factor of channels: (n,) to (n,)."""
    return _of_rows(len(vector), 1).apply(vector)


def unpack_vector(stored: Tensor) -> Tensor:
    """Undo `pack_vector`."""
    return _of_rows(len(stored), 1).undo(stored)


def pack_down(down: Tensor) -> Tensor:
    """A branch's first matrix (rank, columns) to (columns, rank), which is its shape by name alone."""
    return _of_down(*down.shape).apply(down).view(down.shape[::-1])


def unpack_down(stored: Tensor) -> Tensor:
    """Undo `pack_down`."""
    columns, rank = stored.shape
    return _of_down(rank, columns).undo(stored).view(rank, columns)


def pack_up(up: Tensor) -> Tensor:
    """A branch's second matrix (rows, rank) to (rows, rank)."""
    return _of_up(*up.shape).apply(up).view(up.shape)


def unpack_up(stored: Tensor) -> Tensor:
    """Undo `pack_up`."""
    return _of_up(*stored.shape).undo(stored).view(stored.shape)
