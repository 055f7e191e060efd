"""Packing: codes of 1 to 8 bits to bytes and back.

A row is a little-endian bit stream along the last dimension: the first code fills the lowest bits of the first byte
(for 4 bits, the low nibble comes first). Rows start on a byte, and the rest of the last byte is zero.
"""

import math
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_size(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes of `bits` bits takes."""
    return math.ceil(n * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n], each below 2^bits, into uint8 bytes [..., ceil(n * bits / 8)].

    With 8 bits it returns `codes` itself. Raises ValueError if `bits` is not 1 to 8.
    """
    group, group_bytes, word = _layout(bits)
    if bits == 8:
        return codes
    n = codes.shape[-1]
    groups = F.pad(codes, (0, -n % group)).unflatten(-1, (-1, group)).to(word)
    words = reduce(or_, (groups[..., i] << (bits * i) for i in range(group)))
    octets = torch.stack([(words >> (8 * i)).to(torch.uint8) for i in range(group_bytes)], dim=-1)
    return octets.flatten(-2)[..., : packed_size(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`: the `n` uint8 codes [..., n] of every row.

    With 8 bits it returns `packed` itself. Raises ValueError if `bits` is not 1 to 8, or if a row of `packed` has not
    exactly the bytes of `n` codes.
    """
    group, group_bytes, word = _layout(bits)
    size = packed.shape[-1]
    if size != packed_size(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_size(n, bits)} bytes, not {size}")
    if bits == 8:
        return packed
    octets = F.pad(packed, (0, -size % group_bytes)).unflatten(-1, (-1, group_bytes)).to(word)
    words = reduce(or_, (octets[..., i] << (8 * i) for i in range(group_bytes)))
    codes = torch.stack([((words >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(group)], dim=-1)
    return codes.flatten(-2)[..., :n]


def _layout(bits: int) -> tuple[int, int, torch.dtype]:
    """The fewest codes that fill whole bytes, how many bytes they fill, and the narrowest dtype to hold those."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    common = math.gcd(bits, 8)
    group_bytes = bits // common
    word = {1: torch.uint8, 3: torch.int32}.get(group_bytes, torch.int64)
    return 8 // common, group_bytes, word
