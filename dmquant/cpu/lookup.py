"""CPU: weights by table lookup, two bytes of codes at a time; large activations through one compiled loop.

Both give the reference's result bit for bit.
"""

import dataclasses
import functools
from collections import Counter

import torch
from torch import Tensor

from dmquant import activations, qtensor
from dmquant.activations import ActivationSpec, in_parts
from dmquant.cpu import solving
from dmquant.cpu.compiling import missing_to_compile
from dmquant.formats import FloatFormat, Format
from dmquant.grids import ScaledGrid
from dmquant.qtensor import WeightSpec
from dmquant.scaling import from_matrix

WORTH_COMPILING = 1 << 18  # elements in a call; below, the compiled loop saves only microseconds
PAYS_AFTER = 1 << 31  # elements in all; before, a run ends sooner without the seconds that compiling takes
_FEW_BINADES = 32  # no format of up to five exponent bits has more; beyond, bit casts cost less than comparisons
_CACHED = 1 << 16  # elements whose float32 copies stay in a core's cache
_seen: Counter[ActivationSpec] = Counter()
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # one element of so many bytes


@functools.cache
def _pair_table(fmt: Format, dtype: torch.dtype) -> Tensor | None:
    """For each of the 65,536 contents of two bytes, the values of the codes in them as one wide element.

    None where codes do not fill bytes, where the codes of two take more than the widest element, as in float64, and
    where `dtype` does not hold the values exactly.
    """
    if fmt.bits not in (4, 8) or 16 // fmt.bits * dtype.itemsize not in _WIDE:
        return None
    contents, shifts = torch.arange(1 << 16, device="cpu"), torch.arange(0, 16, fmt.bits, device="cpu")
    exact = fmt.decode((contents.unsqueeze(-1) >> shifts) & ((1 << fmt.bits) - 1))
    values = exact.to(dtype)
    if not torch.equal(values.float().nan_to_num(), exact.nan_to_num()):
        return None
    return values.view(_WIDE[values.shape[-1] * values.element_size()]).flatten()


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `qtensor.dequantize`, same shapes; by the reference where pairs of codes cannot be looked up."""
    # Compiled code fuses the reference better than it looks up tables.
    if spec.grid_type is not ScaledGrid or torch.compiler.is_compiling():
        return qtensor.dequantize(codes, scale, spec, shape, dtype)
    segments, size = spec.segments(shape), spec.granularity.size
    table = _pair_table(spec.fmt, dtype)
    row_bits = sum(segments) * spec.fmt.bits
    if table is None or row_bits % 16 or any(columns % (size or 1) for columns in segments):
        return qtensor.dequantize(codes, scale, spec, shape, dtype)
    index = codes.view(torch.uint16).flatten().int()
    matrix = table.index_select(0, index).view(dtype).view(shape[0], -1)
    scales = scale.expand(len(matrix), -1).split([columns // (size or columns) for columns in segments], 1)
    for values, of_groups in zip(matrix.split(segments, 1), scales, strict=True):
        _scale_rows(values.unflatten(1, (of_groups.shape[1], -1)), of_groups.unsqueeze(-1))
    return from_matrix(matrix, shape, spec.split)


def _scale_rows(groups: Tensor, scale: Tensor) -> None:
    """Multiply in place by float32 scales, rounding each product once to the dtype of `groups`."""
    narrow = scale.to(groups.dtype)
    if torch.equal(narrow.float(), scale):
        groups.mul_(narrow)
        return
    # Mixed dtypes make float32 copies of what they multiply: some rows at a time, they stay in the cache.
    rows = max(1, _CACHED // groups[0].numel())
    for part, part_scale in zip(groups.split(rows), scale.split(rows), strict=True):
        part.mul_(part_scale)


class _ComparingFormat(FloatFormat):
    """A float format that finds binades by comparisons: compiled for a CPU, a bit cast goes through memory."""

    def _binade(self, x: Tensor) -> Tensor:
        magnitude = x.abs()
        binade = torch.full_like(magnitude, 2.0**self.min_exponent)
        for exponent in range(self.min_exponent + 1, self.max_exponent + 1):
            binade = torch.where(magnitude >= 2.0**exponent, 2.0**exponent, binade)
        return binade


@functools.cache
def _to_compile(spec: ActivationSpec) -> ActivationSpec:
    """The same quantization, in operations that compile to faster code."""
    fmt = spec.fmt
    if isinstance(fmt, FloatFormat) and fmt.max_exponent - fmt.min_exponent < _FEW_BINADES:
        return dataclasses.replace(spec, fmt=_ComparingFormat(fmt.exponent, fmt.mantissa))
    return spec


@functools.cache
def _compiled_fake_quantize():
    return torch.compile(activations.fake_quantize, dynamic=True)


def _worth_compiling(x: Tensor, spec: ActivationSpec) -> bool:
    if x.numel() < WORTH_COMPILING:
        return False
    _seen[spec] += x.numel()
    return _seen[spec] >= PAYS_AFTER and not missing_to_compile()


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None = None) -> Tensor:
    """As `activations.fake_quantize`, bit for bit; same shape and dtype as `x`."""
    if scale is not None or spec.engine is not None:
        return activations.fake_quantize(x, spec, dim, scale)
    if spec.center or spec.split is not None:  # so that one compiled loop serves every split
        return in_parts(fake_quantize, x, spec, dim)
    if not torch.compiler.is_compiling() and (done := solving.fake_quantize(x, spec, dim)) is not None:
        return done
    if not torch.compiler.is_compiling() and _worth_compiling(x, spec):
        spec, tokens = _to_compile(spec), x.movedim(dim, -1)
        if spec.scale_by_row or not tokens.is_contiguous():
            return _compiled_fake_quantize()(x, spec, dim)
        matrix = tokens.flatten(0, -2)  # torch.compile gives up after eight variants: spare it the number of dimensions
        return _compiled_fake_quantize()(matrix, spec, -1).view(tokens.shape).movedim(-1, dim)
    return activations.fake_quantize(x, spec, dim)
