"""The functions of integer.cpp on tensors, and the instructions that they may use.

Inputs become bytes, code + zero; weights stay packed, or lie as panels of bytes; sums of products are exact int32.
"""

import ctypes
import functools
import os
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from dmquant.cpu.compiling import library
from dmquant.errors import check_choice
from dmquant.formats import FloatFormat, Format, get_format
from dmquant.operands import INT8, unit_of
from dmquant.stores import LARGEST

VARIABLE = "DMQUANT_MAX_CPU_ISA"
LEVELS = ("portable", "avx2", "avx_vnni", "avx512_vnni")  # as in integer.cpp
QUAD = 4  # bytes that one instruction multiplies by as many
_INT16 = (1 << 15) - 1
WIDEST = (1 << 31) // (256 * 128) - 1  # columns up to which no sum leaves 32 bits, whatever the operands
WHOLE = 1 << 40  # the size of a group that is all of a row


class _Format(ctypes.Structure):
    _fields_ = (
        ("is_float", c_int32),
        ("mantissa", c_int32),
        ("lowest", c_float),
        ("highest", c_float),
        ("largest", c_float),
        ("most", c_float),
        ("unit", c_float),
        ("zero", c_int32),
    )


class _Image(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("channels", "height", "width", "padding_y", "padding_x", "pitch"),
            *("stride_channel", "stride_y", "stride_x"),
        )
    )


class _Weights(ctypes.Structure):
    _fields_ = (
        ("packed", c_void_p),
        ("packed_pitch", c_int64),
        ("bits", c_int64),
        ("tables", c_void_p),
        ("shifts", c_void_p),
        *((name, c_int64) for name in ("groups", "size", "outputs", "segments", "columns")),
    )


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("codes", c_void_p),
        *((name, c_int64) for name in ("image_pitch", "y_pitch", "x_pitch", "height", "width")),
        ("segments", c_void_p),
    )


class _Ends(ctypes.Structure):
    _fields_ = (
        ("zero", c_int32),
        ("of_outputs", c_void_p),
        ("of_rows", c_void_p),
        ("rows_of_scale", c_int64),
        ("bias", c_void_p),
        ("pitch", c_int64),
        ("adds", c_int32),
    )


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """integer.cpp for this machine; None where it cannot be compiled."""
    functions = library("integer")
    if functions is not None:
        functions.panel_width.restype = c_int64
    return functions


def level() -> int:
    """The index in LEVELS of the instructions in use: the best of this machine, up to DMQUANT_MAX_CPU_ISA."""
    most = check_choice(VARIABLE, os.environ.get(VARIABLE) or LEVELS[-1], LEVELS)
    return min(LEVELS.index(most), compiled().best_level())


@functools.lru_cache(maxsize=64)
def zero_of(fmt: Format) -> int:
    """The byte of a zero among the codes of a format of inputs."""
    return round(-min(fmt.values.min().item(), -fmt.max) / unit_of(fmt))


@functools.lru_cache(maxsize=64)
def _format(fmt: Format) -> _Format:
    unit, zero = unit_of(fmt), zero_of(fmt)
    if isinstance(fmt, FloatFormat):
        binades = 2.0**fmt.min_exponent, 2.0**fmt.max_exponent
        return _Format(1, fmt.mantissa, *binades, fmt.max, LARGEST / fmt.max, 1 / unit, zero)
    return _Format(0, 0, fmt.min, fmt.max, fmt.max, LARGEST / fmt.max, 1 / unit, zero)


def largest_weight(fmt: Format, at: int) -> int:
    """The largest magnitude of integer weights that are multiplied exactly by inputs in `fmt` at a level.

    Without VNNI pairs of products are summed in 16 bits, where more would saturate.
    """
    if LEVELS[at] != "avx2":
        return INT8 + 1
    return _INT16 // (2 * _largest_byte(fmt))


def _largest_byte(fmt: Format) -> int:
    return zero_of(fmt) + round(fmt.max / unit_of(fmt))


@dataclass(frozen=True)
class Codes:
    """Inputs as bytes: uint8 codes, one after another, with the float32 scales that they were rounded by."""

    codes: Tensor
    scales: Tensor
    fmt: Format


def round_tokens(x: Tensor, fmt: Format, given: Tensor | None = None) -> Codes:
    """Codes (rows, columns up to a multiple of QUAD) of `x` (rows, columns), contiguous float32 or bfloat16.

    Each row has a scale, (rows,) float32: the one `given`, or as `scaling.fit_absmax` fits it. Codes are those of
    `fmt.round(x / scale)` bit for bit; those of NaN are arbitrary, and its row's scale is NaN.
    """
    rows, columns = x.shape
    pitch = -(-columns // QUAD) * QUAD
    codes, scales = x.new_empty((rows, pitch), dtype=torch.uint8), x.new_empty(rows, dtype=torch.float32)
    compiled().round_tokens(
        *_start(x),
        c_int64(rows),
        c_int64(columns),
        ctypes.byref(_format(fmt)),
        _pointer(given),
        _pointer(scales),
        _pointer(codes),
        c_int64(pitch),
        torch.get_num_threads(),
    )
    return Codes(codes, scales, fmt)


def round_images(x: Tensor, fmt: Format, padding: tuple[int, int], given: Tensor | None = None) -> Codes:
    """Codes (batch, height, width, channels up to a multiple of QUAD) of `x` (batch, channels, height, width).

    Height and width have the `padding`, in codes of zero, on both sides. `x` is dense, in either memory format, float32
    or bfloat16; an image has one scale, (batch,) float32, as in `round_tokens`.
    """
    count, channels, height, width = x.shape
    pitch = -(-channels // QUAD) * QUAD
    padded = count, height + 2 * padding[0], width + 2 * padding[1], pitch
    codes, scales = x.new_empty(padded, dtype=torch.uint8), x.new_empty(count, dtype=torch.float32)
    image = _Image(channels, height, width, *padding, pitch, *x.stride()[1:])
    compiled().round_images(
        *_start(x),
        c_int64(count),
        ctypes.byref(image),
        ctypes.byref(_format(fmt)),
        _pointer(given),
        _pointer(scales),
        _pointer(codes),
        torch.get_num_threads(),
    )
    return Codes(codes, scales, fmt)


@dataclass(frozen=True)
class Operand:
    """Packed integer weights and their place in rows of codes; the tensors must live as long as it is used.

    Row o has `segments` runs of `columns` columns, each under a group of `size` columns with a power of two.
    """

    packed: Tensor
    """uint8 (outputs, bytes), a view whose rows begin with the operand's first code."""
    bits: int
    tables: Tensor
    """int8 (8, 2^bits): the integer of a code times 2^shift."""
    shifts: Tensor
    """uint8 (outputs, groups), a view whose rows begin with the operand's first group; rows lie `stride(0)` apart."""
    size: int
    segments: int
    columns: int
    largest: int
    """The largest magnitude of an integer."""

    def _as_struct(self) -> _Weights:
        return _Weights(
            self.packed.data_ptr(),
            self.packed.stride(0),
            self.bits,
            self.tables.data_ptr(),
            self.shifts.data_ptr(),
            self.shifts.stride(0),
            self.size,
            len(self.packed),
            self.segments,
            self.columns,
        )

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Panels of bytes for the level in use, int8 (bytes,), and the sums of each output's integers, int32."""
        at = level()
        wide = compiled().panel_width(at)
        outputs = -(-len(self.packed) // wide) * wide
        quads = self.segments * -(-self.columns // QUAD)
        panels = torch.empty(outputs * quads * QUAD, dtype=torch.int8)
        sums = torch.empty(outputs, dtype=torch.int32)
        compiled().expand(at, ctypes.byref(self._as_struct()), _pointer(panels), _pointer(sums))
        return panels, sums


@dataclass(frozen=True)
class Places:
    """Where the inputs of output rows lie among codes, in bytes. A row is a pixel (y, x) of an image's output.

    Its inputs begin at image * `image` + y * `y` + x * `x`, and each of its runs of columns at one of `segments` more.
    """

    image: int
    y: int = 0
    x: int = 0
    height: int = 1
    width: int = 1
    segments: tuple[int, ...] = (0,)


def multiply(
    x: Codes,
    places: Places,
    weight: Operand,
    of_outputs: Tensor,
    bias: Tensor | None,
    out: Tensor,
    expanded: tuple[Tensor, Tensor] | None = None,
    adds: bool = False,
) -> None:
    """Write to `out` (rows, outputs), contiguous float32 or bfloat16: sums of products times both scales, plus bias.

    The sum is an exact int32, everything after it float32, rounded once to the dtype of `out`. `of_outputs` and `bias`
    are float32 (outputs,). Consecutive rows share the scales of `x`, equally many each. With `adds`, the result is
    added to `out`.
    """
    rows, at = len(out), level()
    ends = _Ends(
        zero_of(x.fmt),
        of_outputs.data_ptr(),
        x.scales.data_ptr(),
        max(1, rows // len(x.scales)),
        None if bias is None else bias.data_ptr(),
        out.stride(0),
        adds,
    )
    together = _INT16 // max(1, 2 * _largest_byte(x.fmt) * weight.largest)
    at_segments = _segments(places.segments)
    inputs = _Inputs(
        *(x.codes.data_ptr(), places.image, places.y, places.x, places.height, places.width),
        ctypes.addressof(at_segments),
    )
    panels, sums = expanded or (None, None)
    compiled().multiply(
        at,
        ctypes.byref(inputs),
        c_int64(rows),
        ctypes.byref(weight._as_struct()),
        _pointer(panels),
        _pointer(sums),
        c_int64(together),
        ctypes.byref(ends),
        *_start(out),
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=64)
def _segments(offsets: tuple[int, ...]) -> ctypes.Array:
    return (c_int64 * len(offsets))(*offsets)


def _pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _start(x: Tensor) -> tuple[c_void_p, int]:
    return _pointer(x), int(x.dtype == torch.bfloat16)


@functools.cache
def wrong(at: int) -> str | None:
    """What is wrong with sums at a level: None where products of the largest operands equal exact arithmetic.

    The processor itself is asked what it does, not a table of names.
    """
    rows, outputs, columns = 7, 70, 1030
    generator = torch.Generator().manual_seed(0)
    for name in ("int8", "fp6_e2m3"):
        fmt = get_format(name)
        most = min(largest_weight(fmt, at), INT8)
        signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
        codes = round_tokens(torch.where(torch.arange(rows).view(-1, 1) % 2 == 0, 1.0, signs.float()), fmt)
        packed = torch.randint(0, 2, (outputs, columns), generator=generator).to(torch.uint8)
        packed[0], packed[1] = 0, 1
        values = torch.zeros(256, dtype=torch.int32)
        values[:2] = torch.tensor([most, -most])
        tables = torch.stack([values << shift for shift in range(8)]).to(torch.int8)
        shifts = torch.zeros(outputs, 1, dtype=torch.uint8)
        weight = Operand(packed, 8, tables, shifts, WHOLE, 1, columns, most)
        out = torch.empty(rows, outputs)
        multiply(
            Codes(codes.codes, torch.ones(rows), fmt),
            Places(codes.codes.shape[1]),
            weight,
            torch.ones(outputs),
            None,
            out,
        )
        exact = (codes.codes[:, :columns].long() - zero_of(fmt)) @ values[packed.long()].long().T
        if not torch.equal(out.double(), exact.float().double()):
            return f"exact sums: those of this processor, in {LEVELS[at]}, are not"
    return None
