"""integer.cpp from Python: plans of layers, which products run by, and the instructions that they may use."""

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from dmquant.cpu.compiling import library
from dmquant.cpu.fast_dtype import SHAPE, fast_dtype, product_in
from dmquant.cpu.measured import best_times, ratio
from dmquant.errors import check_choice
from dmquant.formats import FloatFormat, Format, get_format
from dmquant.operands import INT8, unit_of
from dmquant.stores import LARGEST

VARIABLE = "DMQUANT_MAX_CPU_ISA"
LEVELS = ("portable", "avx2", "avx_vnni", "avx512_vnni")  # as in integer.cpp
WIDEST = (1 << 31) // (256 * 128) - 1  # columns up to which no sum leaves 32 bits, whatever the operands
WHOLE = 1 << 40  # the size of a group that is all of a row
_INT16 = (1 << 15) - 1
SLOWER = 1.2  # of a product in floating point, beside which weights must be expanded and inputs rounded
_QUAD = 4  # bytes that one instruction multiplies by as many


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


_Format = _struct(
    "_Format",
    is_float=c_int32,
    mantissa=c_int32,
    lowest=c_float,
    highest=c_float,
    largest=c_float,
    most=c_float,
    unit=c_float,
    zero=c_int32,
)
_Weights = _struct(
    "_Weights",
    packed=c_void_p,
    packed_pitch=c_int64,
    bits=c_int64,
    tables=c_void_p,
    factors=c_void_p,
    **dict.fromkeys(("groups", "size", "outputs", "segments", "columns"), c_int64),
)
_Plan = _struct(
    "_Plan",
    format=_Format,
    level=c_int32,
    halves=c_int32,
    together=c_int64,
    weights=_Weights * 2,
    panels=c_void_p * 2,
    sums=c_void_p * 2,
    of_outputs=c_void_p * 2,
    bias=c_void_p,
    bias_is_bfloat16=c_int32,
)
_Images = _struct(
    "_Images",
    **dict.fromkeys(("count", "channels", "height", "width", "image", "channel", "y", "x"), c_int64),
    **dict.fromkeys(("kernel_y", "kernel_x", "step_y", "step_x", "padding_y", "padding_x"), c_int64),
    **dict.fromkeys(("dilation_y", "dilation_x", "out_height", "out_width"), c_int64),
)


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """integer.cpp for this machine; None where it cannot be compiled."""
    functions = library("integer")
    if functions is not None:
        functions.panel_width.restype = c_int64
        functions.expand.argtypes = c_void_p, c_int, c_void_p, c_void_p
        counts = c_int64, c_int64, c_int64
        functions.run_tokens.argtypes = c_void_p, c_void_p, c_int, *counts, c_void_p, c_void_p, c_int
        functions.run_images.argtypes = c_void_p, c_void_p, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int
    return functions


def level() -> int:
    """The index in LEVELS of the instructions in use: the best of this machine, up to DMQUANT_MAX_CPU_ISA."""
    return min(LEVELS.index(allowed()), compiled().best_level())


def allowed() -> str:
    """The best of LEVELS that DMQUANT_MAX_CPU_ISA leaves; UsageError for another word."""
    return check_choice(VARIABLE, os.environ.get(VARIABLE) or LEVELS[-1], LEVELS)


@functools.lru_cache(maxsize=64)
def _format(fmt: Format) -> _Format:
    unit = unit_of(fmt)
    zero = round(-min(fmt.values.min().item(), -fmt.max) / unit)
    if isinstance(fmt, FloatFormat):
        binades = 2.0**fmt.min_exponent, 2.0**fmt.max_exponent
        return _Format(1, fmt.mantissa, *binades, fmt.max, LARGEST / fmt.max, 1 / unit, zero)
    return _Format(0, 0, fmt.min, fmt.max, fmt.max, LARGEST / fmt.max, 1 / unit, zero)


def _pairs(fmt: Format, largest: int) -> int:
    """The number of sums of two products of inputs in `fmt` and integers up to `largest` that fit 16 bits."""
    byte = _format(fmt).zero + round(fmt.max / unit_of(fmt))
    return _INT16 // (2 * byte * max(1, largest))


def largest_weight(fmt: Format, at: int) -> int:
    """The largest magnitude of integer weights that are multiplied exactly by inputs in `fmt` at a level.

    Without VNNI pairs of products are summed in 16 bits, where more would saturate.
    """
    return _pairs(fmt, 1) if LEVELS[at] == "avx2" else INT8 + 1


@dataclass(frozen=True)
class Weight:
    """Packed integer weights, as `operands.IntegerWeight`, with what else turns sums of products into outputs.

    The product reads these tensors where they lie: all contiguous, and to be left alone as long as it is used.
    """

    packed: Tensor
    """uint8 (outputs, bytes)."""
    tables: Tensor
    """int8 (factors, 2^bits): the integer of a code times 0, 1, 2, ..."""
    factors: Tensor
    """uint8 (outputs, groups)."""
    of_outputs: Tensor
    """float32 (halves, outputs): what a sum is multiplied by, besides the scale of the input."""
    bias: Tensor | None
    """float32 or bfloat16 (outputs,)."""
    fmt: Format
    """The inputs' format."""
    size: int
    """Columns of a group."""
    parts: Sequence[int]
    """Input channels of the halves."""
    positions: int
    """Positions of the kernel."""


class Plan:
    """How a weight is multiplied at the level in use; `panels` are its expanded form, in place of the packed one."""

    def __init__(self, weight: Weight, panels: Sequence[tuple[Tensor, Tensor]] = ()):
        self.weight, self.panels, bits = weight, panels, round(math.log2(weight.tables.shape[1]))
        largest = int(weight.tables[-1].to(torch.int32).abs().max())
        self._plan = plan = _Plan(_format(weight.fmt), level(), len(weight.parts), _pairs(weight.fmt, largest))
        byte, group = 0, 0
        for half, part in enumerate(weight.parts):
            plan.weights[half] = _Weights(
                *(weight.packed.data_ptr() + byte, weight.packed.shape[1], bits),
                *(weight.tables.data_ptr(), weight.factors.data_ptr() + group, weight.factors.shape[1], weight.size),
                *(len(weight.packed), weight.positions, part),
            )
            plan.of_outputs[half] = weight.of_outputs[half].data_ptr()
            byte += part * weight.positions * bits // 8
            group += math.ceil(part * weight.positions / weight.size)
        for half, (bytes_, sums) in enumerate(panels):
            plan.panels[half], plan.sums[half] = bytes_.data_ptr(), sums.data_ptr()
        if weight.bias is not None:
            plan.bias, plan.bias_is_bfloat16 = weight.bias.data_ptr(), weight.bias.dtype == torch.bfloat16
        self._at = ctypes.addressof(plan)

    def expanded(self) -> list[tuple[Tensor, Tensor]]:
        """The panels of bytes of each half, int8, and the sums of each output's integers, int32."""
        wide, made = compiled().panel_width(self._plan.level), []
        outputs = math.ceil(len(self.weight.packed) / wide) * wide
        for half, part in enumerate(self.weight.parts):
            quads = self.weight.positions * math.ceil(part / _QUAD)
            panels, sums = (
                torch.empty(outputs * quads * _QUAD, dtype=torch.int8, device="cpu"),
                torch.empty(outputs, dtype=torch.int32, device="cpu"),
            )
            compiled().expand(self._at, half, panels.data_ptr(), sums.data_ptr())
            made.append((panels, sums))
        return made

    def run(self, x: Tensor, rows_of_scale: int = 1, given: Tensor | None = None) -> Tensor:
        """The product (rows, outputs) of `x` (rows, channels), contiguous float32 or bfloat16, in its dtype.

        So many consecutive rows share a scale: `given`, float32, or as `scaling.fit_absmax` fits it. Codes are those
        of `fmt.round(x / scale)`, sums are exact int32, and the rest is float32, rounded once to the dtype of `x`.
        """
        rows, channels = x.shape
        out = x.new_empty(rows, len(self.weight.packed))
        compiled().run_tokens(
            *(self._at, x.data_ptr(), x.dtype == torch.bfloat16, rows, channels, rows_of_scale),
            *(None if given is None else given.data_ptr(), out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def run_images(
        self,
        x: Tensor,
        kernel: Sequence[int],
        geometry: Sequence[int],
        images_of_scale: int = 1,
        given: Tensor | None = None,
    ) -> Tensor:
        """The convolution of `x` (batch, channels, height, width), dense in either memory format, by a kernel's size.

        `geometry` is stride, padding and dilation, two each. The output is in the memory format channels last; the rest
        is as in `run`.
        """
        size = output_size(x.shape[2:], kernel, geometry)
        out = x.new_empty(len(x), *size, len(self.weight.packed))
        images = _Images(*x.shape, *x.stride(), *kernel, *geometry, *size)
        compiled().run_images(
            *(self._at, x.data_ptr(), x.dtype == torch.bfloat16, ctypes.addressof(images), images_of_scale),
            *(None if given is None else given.data_ptr(), out.data_ptr(), torch.get_num_threads()),
        )
        return out.movedim(-1, 1)


def output_size(size: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    return tuple(
        (size[i] + 2 * geometry[2 + i] - geometry[4 + i] * (kernel[i] - 1) - 1) // geometry[i] + 1 for i in (0, 1)
    )


@functools.cache
def slower(dtype: torch.dtype) -> str | None:
    """A product in floating point that takes less time here than one of integers, for inputs of `dtype`; None without.

    Some processors have units for bfloat16 that are faster than what integer.cpp knows.
    """
    (tokens, inputs, outputs), fmt = SHAPE, get_format("int8")
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=draw, device="cpu")
    integers = torch.arange(-8, 8, dtype=torch.int8, device="cpu")
    tables = torch.stack([torch.zeros_like(integers), integers])
    factors = torch.ones(outputs, inputs // 16, dtype=torch.uint8, device="cpu")
    scale = torch.ones(1, outputs, dtype=torch.float32, device="cpu")
    plan = Plan(Weight(packed, tables, factors, scale, None, fmt, 16, (inputs,), 1))
    x = torch.randn(tokens, inputs, generator=draw, dtype=torch.float32, device="cpu").to(dtype)
    floats = fast_dtype(dtype)

    def measure() -> float:
        taken = best_times({"integer": lambda: plan.run(x), "float": product_in(floats)})
        return taken["integer"] / taken["float"]

    return f"{floats}".removeprefix("torch.") if ratio(f"integer / {dtype}", measure) > SLOWER else None


@functools.cache
def wrong(at: int) -> str | None:
    """What is wrong with sums at a level: None where products of the largest operands equal exact arithmetic.

    The processor itself is asked what it does, not a table of names.
    """
    rows, outputs, columns = 7, 70, 1030
    generator = torch.Generator().manual_seed(0)
    for name in ("int8", "fp6_e2m3"):
        fmt = get_format(name)
        most, unit = min(largest_weight(fmt, at), INT8), unit_of(fmt)
        x = torch.randint(0, 2, (rows, columns), generator=generator, device="cpu") * 2 * fmt.max - fmt.max
        x[0], x[1] = fmt.max, -fmt.max
        packed = torch.randint(0, 2, (outputs, columns), generator=generator, device="cpu").to(torch.uint8)
        packed[0], packed[1] = 0, 1
        values = torch.zeros(256, dtype=torch.int32, device="cpu")
        values[:2] = torch.tensor([most, -most], dtype=torch.float32, device="cpu")
        tables = torch.stack([0 * values, values]).to(torch.int8)
        factors = torch.ones(outputs, 1, dtype=torch.uint8, device="cpu")
        scale = torch.full((1, outputs), unit, dtype=torch.float32, device="cpu")
        plan = Plan(Weight(packed, tables, factors, scale, None, fmt, WHOLE, (columns,), 1))
        exact = (x / unit).long() @ values[packed.long()].long().T
        scales = torch.ones(rows, dtype=torch.float32, device="cpu")
        if not torch.equal(plan.run(x, given=scales), exact.float() * unit):
            return f"exact sums: those of this processor, in {LEVELS[at]}, are not"
    return None
