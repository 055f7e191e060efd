"""Operators that torch.compile and CUDA graphs take whole: inputs to operands, packed weights to operands or values.

Each is a Triton kernel where there is Triton, and elsewhere the operations of torch that define it, with equal results.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmquant.activations import ActivationSpec, fake_quantize, online_scale
from dmquant.formats import Format, get_format
from dmquant.gpu.operands import unit
from dmquant.packing import unpack
from dmquant.scaling import Granularity, fit_absmax

INTERPRETER = "TRITON_INTERPRET"  # Triton's own variable: its kernels run on CPU tensors
_ENCODED = ("fp32", "bf16")  # stores in which Triton encodes scales
_WIDEST = 1 << 14  # channels that stay in registers between the search for the largest and the rounding


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; on a GPU without it, one note says so."""
    found = importlib.util.find_spec("triton") is not None
    if not found and torch.cuda.is_available():
        logging.getLogger("dmquant").warning("without Triton layers are slower on the GPU: pip install triton")
    return found


def takes_triton(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor like this one."""
    return (x.is_cuda or (x.device.type == "cpu" and os.environ.get(INTERPRETER) == "1")) and has_triton()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which Triton launches on the GPU where `x` is, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as an operator where a graph is captured; by itself where none is, which takes less time."""
    whole = torch.library.custom_op(f"dmquant::cuda_{function.__name__}", function, mutates_args=())

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return whole(*args) if torch.compiler.is_compiling() else function(*args)

    call.register_fake = whole.register_fake
    call.whole = whole
    return call


def _scale_of(largest: Tensor, rows: int, fmt: Format, store: str) -> Tensor:
    """Online scales by the largest magnitudes (tokens of all rows, groups): float32, flat."""
    spec = ActivationSpec(fmt, Granularity("group", 1), store)
    return online_scale(largest.float().unsqueeze(-1), rows, spec).flatten()


@operator
def quantize_tokens(
    x: Tensor, scale: Tensor | None, fmt: str, store: str, dtype: torch.dtype, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Tokens (n, channels) as an operand (rows, columns) of int8 or E4M3, and its scales (n,) float32.

    Online scales as `ActivationSpec` has them for `token`, or given ones, `scale` (n,). Columns beyond the channels are
    zero, rows beyond the tokens hold anything. The scale of a token of NaN is NaN.
    """
    kind, x = get_format(fmt), x.contiguous()
    divisor = unit(kind, dtype)
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if takes_triton(x) and columns <= _WIDEST:
        from dmquant.gpu.fused.rows import quantize_rows

        if scale is None and store not in _ENCODED:
            scale = _scale_of(x.abs().amax(1, keepdim=True), len(x), kind, store)
        with on_device_of(x):
            return codes, quantize_rows(x, codes, kind, divisor, scale, store == "bf16")
    wide = x.float()
    scale = _scale_of(wide.abs().amax(1, keepdim=True), len(x), kind, store) if scale is None else scale
    values = kind.round(wide / scale.unsqueeze(1)) / divisor
    lost = values.isnan().any(1)
    values = F.pad(values.masked_fill_(lost.unsqueeze(1), 0), (0, columns - x.shape[1]))
    codes[: len(x)] = values.to(dtype)
    return codes, (scale * divisor).masked_fill_(lost, torch.nan)


@quantize_tokens.register_fake
def _(x, scale, fmt, store, dtype, rows, columns):
    return x.new_empty(rows, columns, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)


@operator
def round_tokens(x: Tensor, fmt: str, granularity: str, store: str, rows: int) -> Tensor:
    """`fake_quantize` of tokens (n, channels) of so many rows of a batch, bit for bit, without halves; same dtype."""
    spec, x = ActivationSpec(get_format(fmt), Granularity.parse(granularity), store), x.contiguous()
    size = spec.granularity.size or x.shape[1]
    if not takes_triton(x) or x.shape[1] % size or size > _WIDEST or not x.numel():
        return fake_quantize(x.view(rows, -1, x.shape[1]), spec).view(x.shape)
    from dmquant.gpu.fused.rows import round_rows

    groups, scale = x.view(-1, size), None
    if spec.granularity.kind in ("tensor", "image"):
        images = x.view(rows if spec.granularity.kind == "image" else 1, -1)
        largest = images.abs().amax(1).float().view(-1, 1, 1)
        scale = fit_absmax(largest, spec.fmt, store).decode().repeat_interleave(len(x) // len(images)).flatten()
    elif store not in _ENCODED:
        scale = _scale_of(x.view(len(x), -1, size).abs().amax(-1), rows, spec.fmt, store)
    with on_device_of(x):
        return round_rows(groups, spec.fmt, scale, store == "bf16").view(x.shape)


@round_tokens.register_fake
def _(x, fmt, granularity, store, rows):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator
def expand(
    codes: Tensor,
    table: Tensor,
    stored: Tensor | None,
    base: Tensor | None,
    scale_table: Tensor | None,
    bits: int,
    columns: int,
    size: int,
    dtype: torch.dtype,
    rows: int,
    width: int,
) -> Tensor:
    """Packed codes (n, bytes) of `columns` columns as a matrix (rows, width) of `dtype`, zero where it is larger.

    The code c is `table[c]`, float32, times the scale of its group of `size` columns: `stored` (n or 1, groups) is that
    scale in floating point, or as uint8 its place in `scale_table` (256,), times `base` (n or 1,), both float32.
    """
    if takes_triton(codes):
        from dmquant.gpu.fused import weights

        out = torch.empty(rows, width, dtype=dtype, device=codes.device)
        with on_device_of(codes):
            weights.expand(codes, table, bits, columns, size, out, stored, base, scale_table)
        return out
    values = table[unpack(codes, bits, columns).int()]
    if stored is not None:
        factor = stored.float() if scale_table is None else base.unsqueeze(1) * scale_table[stored.int()]
        values = values * factor.repeat_interleave(size, 1)[:, :columns]
    return F.pad(values, (0, width - columns, 0, rows - len(codes))).to(dtype)


@expand.register_fake
def _(codes, table, stored, base, scale_table, bits, columns, size, dtype, rows, width):
    return codes.new_empty(rows, width, dtype=dtype)


def finish(sums: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product from its sums, int32 or float32 (at least tokens, at least channels): times scales, plus the bias.

    `token` (tokens,) and `channel` (channels,) are float32, as is all of the arithmetic; the result (tokens, channels)
    is rounded once, to `dtype`.
    """
    if not torch.compiler.is_compiling() and takes_triton(sums):
        from dmquant.gpu.fused import finishing

        out = torch.empty(len(token), len(channel), dtype=dtype, device=sums.device)
        with on_device_of(sums):
            finishing.finish(sums, token, channel, bias, out)
        return out
    y = sums[: len(token), : len(channel)].float() * token.unsqueeze(1) * channel
    return (y if bias is None else y + bias.float()).to(dtype)
