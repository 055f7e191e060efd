"""Quantization of the rows of a matrix: one read, one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmquant.formats import Format, IntFormat
from dmquant.gpu.fused.rounding import rounded
from dmquant.stores import LARGEST, SMALLEST

_TILE, _WARP = 1 << 11, 32


@triton.jit
def _quantize_rows(
    x, out, scales, given, rows, columns, out_columns,
    FAKE: tl.constexpr, GIVEN: tl.constexpr, NARROW: tl.constexpr, INTEGER: tl.constexpr, PARITY: tl.constexpr,
    LOWEST_BINADE: tl.constexpr, HIGHEST_BINADE: tl.constexpr, ANCHOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, UNIT: tl.constexpr, TINY: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        s = tl.load(given + r, mask=r < rows, other=1.0)
    else:
        s = tl.math.div_rn(tl.maximum(tl.max(tl.abs(v), 1), TINY), HIGH)
        s = tl.minimum(tl.maximum(s, TINY), LIMIT)
        if NARROW:
            s = rounded(s, tl.bfloat16).to(tl.float32)
    q = tl.math.div_rn(v, tl.broadcast_to(s[:, None], v.shape))
    lost = tl.max((q != q).to(tl.int32), 1) > 0  # a row with a NaN is one of NaN: no code says so, its scale does
    s = tl.where(lost, float("nan"), s)
    if INTEGER:
        anchor = tl.full(v.shape, ANCHOR, tl.float32)
    else:
        binade = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.minimum(tl.maximum(binade, LOWEST_BINADE), HIGHEST_BINADE)
        anchor = binade * ANCHOR
        if PARITY:  # no bit of the mantissa: every second binade starts at an odd code
            lowest = tl.full(v.shape, LOWEST_BINADE, tl.float32).to(tl.int32, bitcast=True)
            odd = ((binade.to(tl.int32, bitcast=True) - lowest) >> 23) & 1
            anchor = (anchor.to(tl.int32, bitcast=True) + odd).to(tl.float32, bitcast=True)
    q = tl.minimum(tl.maximum((q + anchor) - anchor, LOW), HIGH)
    written = (r < rows)[:, None] & (c < out_columns)[None, :]
    place = out + r.to(tl.int64)[:, None] * out_columns + c[None, :]
    if FAKE:
        y = tl.where(lost[:, None], float("nan"), q * s[:, None])
        tl.store(place, rounded(y, out.dtype.element_ty), mask=written)
    else:
        q = tl.where(lost[:, None] | (c >= columns)[None, :], 0.0, q * (1.0 / UNIT))
        tl.store(place, q.to(out.dtype.element_ty), mask=written)
        tl.store(scales + r, s * UNIT, mask=r < rows)


def quantize_rows(x: Tensor, out: Tensor, fmt: Format, unit: float, scale: Tensor | None, narrow: bool) -> Tensor:
    """Write the codes of a contiguous `x` (rows, columns) over `unit` to `out` (at least rows, at least columns).

    Returns the scales, float32 (rows,), times `unit`: absmax ones, rounded to bfloat16 if `narrow`, or `scale` (rows,).
    """
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch(x, out, scales, scale, fmt, unit, narrow, fake=False)
    return scales


def round_rows(x: Tensor, fmt: Format, scale: Tensor | None, narrow: bool) -> Tensor:
    """The values nearest to a contiguous `x` (rows, columns), by scales as in `quantize_rows`; its shape and dtype."""
    out = torch.empty_like(x)
    _launch(x, out, out, scale, fmt, 1.0, narrow, fake=True)
    return out


def _launch(
    x: Tensor, out: Tensor, scales: Tensor, given: Tensor | None, fmt: Format, unit: float, narrow: bool, fake: bool
) -> None:
    (rows, columns), integer = x.shape, isinstance(fmt, IntFormat)
    width = triton.next_power_of_2(out.shape[1])
    height = max(1, _TILE // width)
    if not rows:
        return
    _quantize_rows[(triton.cdiv(rows, height),)](
        x, out, scales, scales if given is None else given.contiguous(), rows, columns, out.shape[1],
        FAKE=fake, GIVEN=given is not None, NARROW=narrow, INTEGER=integer,
        PARITY=not integer and fmt.mantissa == 0,
        LOWEST_BINADE=1.0 if integer else 2.0**fmt.min_exponent,
        HIGHEST_BINADE=1.0 if integer else 2.0**fmt.max_exponent,
        ANCHOR=1.5 * 2.0 ** (23 if integer else 23 - fmt.mantissa),
        LOW=fmt.min if integer else -fmt.max, HIGH=fmt.max, UNIT=unit, TINY=SMALLEST, LIMIT=LARGEST / fmt.max,
        BLOCK_R=height, BLOCK_C=width, num_warps=min(16, max(1, height * width // (16 * _WARP))),
    )  # fmt: skip
