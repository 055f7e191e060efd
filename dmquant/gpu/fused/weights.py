"""Packed codes to a matrix of operands or values."""

import triton
import triton.language as tl
from torch import Tensor

from dmquant.gpu.fused.rounding import rounded


@triton.jit
def _expand(
    codes, table, stored, base, out, rows, row_bytes, columns, out_columns, size, scale_stride, base_stride,
    BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, scale_table=None,
):  # fmt: skip
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < tl.where(r < rows, columns, 0)
    row = tl.minimum(r, rows - 1)
    at = codes + row.to(tl.int64) * row_bytes
    first = (c * BITS) >> 3
    word = tl.load(at + first, mask=inside, other=0).to(tl.int32)
    if (8 % BITS) != 0:  # a code may lie in two bytes
        word |= tl.load(at + first + 1, mask=inside & (first + 1 < row_bytes), other=0).to(tl.int32) << 8
    code = (word >> ((c * BITS) & 7)) & ((1 << BITS) - 1)
    value = tl.load(table + code, mask=inside, other=0.0)
    if KIND != "none":
        scale = tl.load(stored + row * scale_stride + c // size, mask=inside, other=1)
        if KIND == "table":
            factor = tl.load(scale_table + scale.to(tl.int32), mask=inside, other=0.0)
            factor = tl.load(base + row * base_stride) * factor
        else:
            factor = scale.to(tl.float32)
        value = tl.where(inside, value * factor, 0.0)
    tl.store(out + r.to(tl.int64) * out_columns + c, rounded(value, out.dtype.element_ty), mask=c < out_columns)


def expand(
    codes: Tensor,
    table: Tensor,
    bits: int,
    columns: int,
    size: int,
    out: Tensor,
    stored: Tensor | None = None,
    base: Tensor | None = None,
    scale_table: Tensor | None = None,
) -> None:
    """Write `table` (2^bits,) float32, indexed by packed `codes` (rows, bytes), times their scales to `out`.

    `out` has at least as many rows and columns; what is beyond is zero. `stored` (rows or 1, groups of `size` columns):
    floating point scales, or, as uint8, places in `scale_table` (256,), to multiply `base` (rows or 1,), both float32.
    """
    kind = "none" if stored is None else "table" if scale_table is not None else "float"
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    _expand[(len(out), triton.cdiv(out.shape[1], block))](
        codes, table, table if stored is None else stored, table if base is None else base, out, len(codes),
        codes.shape[1], columns, out.shape[1], size, 0 if stored is None or len(stored) == 1 else stored.stride(0),
        0 if base is None or len(base) == 1 else 1, BITS=bits, KIND=kind, BLOCK=block, scale_table=scale_table,
    )  # fmt: skip
