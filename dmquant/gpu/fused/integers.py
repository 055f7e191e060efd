"""The product of int8 operands with its scales and bias: int32 sums stay in registers."""

import triton
import triton.language as tl
from torch import Tensor

from dmquant.gpu.fused.rounding import rounded

TILES = ((128, 128, 128, 8, 3), (128, 256, 64, 8, 4), (64, 128, 128, 4, 4))
"""Ways to cut a product: rows, outputs and columns of a tile, warps, stages."""
_TOGETHER = 8  # tiles of rows that read the same weights one after another


@triton.jit
def _multiply(
    a, b, token, channel, bias, out, rows, outputs, columns,
    BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    tile, across = tl.program_id(0), tl.cdiv(outputs, BLOCK_O)
    first = tile // (TOGETHER * across) * TOGETHER
    height = tl.minimum(tl.cdiv(rows, BLOCK_R) - first, TOGETHER)
    left = tile % (TOGETHER * across)
    r = (first + left % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = left // height * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    at_a = a + (r % rows).to(tl.int64)[:, None] * columns + k[None, :]  # beyond the end: some row again, not stored
    at_b = b + (o % outputs).to(tl.int64)[None, :] * columns + k[:, None]
    sums = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.int32)
    for start in range(0, columns, BLOCK_K):
        left_k = columns - start
        x = tl.load(at_a, mask=k[None, :] < left_k, other=0)
        w = tl.load(at_b, mask=k[:, None] < left_k, other=0)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        at_a += BLOCK_K
        at_b += BLOCK_K
    y = sums.to(tl.float32) * tl.load(token + r, mask=r < rows, other=0.0)[:, None]
    y = y * tl.load(channel + o, mask=o < outputs, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (r < rows)[:, None] & (o < outputs)[None, :]
    place = out + r.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(place, rounded(y, out.dtype.element_ty), mask=inside)


def multiply(a: Tensor, b: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None, out: Tensor, way: int) -> None:
    """Write the product of int8 `a` (at least m, k), `b` (at least n, k), times scales (m,) and (n,), plus bias (n,).

    `out` is (m, n); the arithmetic is that of `finishing`; `way` is a place in TILES.
    """
    rows, outputs = out.shape
    block_r, block_o, block_k, warps, stages = TILES[way]
    _multiply[(triton.cdiv(rows, block_r) * triton.cdiv(outputs, block_o),)](
        a, b, token, channel, token if bias is None else bias, out, rows, outputs, a.shape[1],
        BIAS=bias is not None, BLOCK_R=block_r, BLOCK_O=block_o, BLOCK_K=block_k, TOGETHER=_TOGETHER,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
