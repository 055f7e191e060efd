"""CPU: weights by table lookup, two bytes of codes at a time; large activations through one compiled loop.

Both give the reference's result bit for bit.
"""

import functools
import math
import shutil

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.formats import Format
from dmquant.kernels import reference
from dmquant.qtensor import WeightSpec
from dmquant.scaling import to_groups

WORTH_COMPILING = 1 << 20  # elements; below, a guard check costs more than the fused loop saves
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # one element of so many bytes


@functools.cache
def _pair_table(fmt: Format, dtype: torch.dtype) -> Tensor | None:
    """For each of the 65,536 contents of two bytes, the values of the codes in them as one wide element.

    None where codes do not fill bytes, or `dtype` does not hold the values exactly.
    """
    if fmt.bits not in (4, 8):
        return None
    contents, shifts = torch.arange(1 << 16), torch.arange(0, 16, fmt.bits)
    exact = fmt.decode((contents.unsqueeze(-1) >> shifts) & ((1 << fmt.bits) - 1))
    values = exact.to(dtype)
    if not torch.equal(values.float().nan_to_num(), exact.nan_to_num()):
        return None
    return values.view(_WIDE[values.shape[-1] * values.element_size()]).flatten()


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`."""
    if torch.compiler.is_compiling():  # which fuses the reference better than it looks up tables
        return reference.dequantize(codes, scale, spec, shape, dtype)
    rows = shape[0]
    columns = math.prod(shape[1:])
    table = _pair_table(spec.fmt, dtype)
    row_bits = columns * spec.fmt.bits
    if table is None or row_bits % 16 or columns % (spec.granularity.size or 1):
        return reference.dequantize(codes, scale, spec, shape, dtype)
    index = codes.view(torch.int16).flatten().int() & 0xFFFF
    values = table.index_select(0, index).view(dtype).view(rows, columns)
    groups = to_groups(values, spec.granularity).mul_(scale.unsqueeze(-1))
    return groups.view(shape)


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return shutil.which("c++") is not None or shutil.which("g++") is not None


@functools.cache
def _compiled_fake_quantize():
    return torch.compile(reference.fake_quantize, dynamic=True)


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int) -> Tensor:
    """A layer's input rounded to what `spec` can represent."""
    if x.numel() >= WORTH_COMPILING and can_compile() and not torch.compiler.is_compiling():
        return _compiled_fake_quantize()(x, spec, dim)
    return reference.fake_quantize(x, spec, dim)
