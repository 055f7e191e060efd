"""The scales and the bias of a product, after it."""

import triton
import triton.language as tl
from torch import Tensor

from dmquant.gpu.fused.rounding import rounded


@triton.jit
def _finish(
    sums, token, channel, bias, out, rows, columns, sums_stride,
    BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    y = tl.load(sums + r.to(tl.int64)[:, None] * sums_stride + c[None, :], mask=inside, other=0).to(tl.float32)
    y = y * tl.load(token + r, mask=r < rows, other=0.0)[:, None]
    y = y * tl.load(channel + c, mask=c < columns, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * columns + c[None, :], rounded(y, out.dtype.element_ty), mask=inside)


def finish(sums: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the `sums` of a product, int32 or float32, of at least the shape of `out`, times both scales, plus bias."""
    rows, columns = out.shape
    if out.numel():
        _finish[(triton.cdiv(rows, 8), triton.cdiv(columns, 256))](
            sums, token, channel, token if bias is None else bias, out, rows, columns, sums.stride(0),
            BIAS=bias is not None, BLOCK_R=8, BLOCK_C=256,
        )  # fmt: skip
