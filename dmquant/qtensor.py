"""A quantized tensor: packed codes and their scales, and the specification they were made by."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmquant.errors import UsageError, check_choice
from dmquant.formats import Format, get_format
from dmquant.grids import Grid, grid_type
from dmquant.packing import packed_size
from dmquant.scaling import (
    BLOCK_FORMATS,
    DATA_RULES,
    OF_INPUTS,
    RULES,
    Granularity,
    Scales,
    absmax,
    from_matrix,
    to_groups,
    to_matrix,
)
from dmquant.stores import STORES, TABLES, get_store

_PART = 1 << 20  # weights quantized at once


@dataclass(frozen=True)
class WeightSpec:
    """The quantization of a weight: its format, the elements that share a scale, the scale's rule and store."""

    fmt: Format
    granularity: Granularity
    scale: str
    store: str
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others share no scale."""

    @classmethod
    def parse(
        cls,
        format: str,
        granularity: str = "group:64",
        scale: str = "absmax",
        store: str = "bf16",
        split: int | None = None,
    ) -> "WeightSpec":
        """Parse and check, or raise UsageError; a block format such as `mxfp4` brings its own granularity and store."""
        if block := BLOCK_FORMATS.get(format.lower()):
            format, granularity, store = block
        if granularity in OF_INPUTS:
            raise UsageError(
                f"granularity '{granularity}' is for activations: use tensor, channel or group:N for weights"
            )
        grid_type(store).check(format, granularity, scale)
        fmt, parsed = get_format(format), Granularity.parse(granularity)
        check_choice("scale rule", scale, (*RULES, *DATA_RULES))
        check_choice("scale storage", store, (*STORES, *TABLES))
        return cls(fmt, parsed, scale, store, split)

    @property
    def grid_type(self) -> type[Grid]:
        """The kind of grid that the weights are rounded to."""
        return grid_type(self.store)

    def segments(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Columns of the parts of a row that share no scale, in the matrix form of a weight of this shape."""
        columns = math.prod(shape[1:])
        if self.split is None:
            return (columns,)
        first = columns // shape[1] * self.split
        return first, columns - first

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales, (scale rows, scale columns), or tables, (rows, entries), of a weight of this shape."""
        return self.grid_type.scale_shape(self, shape)

    def base_shape(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Shape of the float32 base that the stored scales are relative to, or None.

        It is one for both halves of a split weight, so that a kernel can apply it to the sum of their products.
        """
        return get_store(self.store).base_shape(self.scale_shape(shape))


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes packed by rows, uint8 (rows, bytes), scales as stored, and the shape of the decoded tensor."""

    codes: Tensor
    scales: Scales
    spec: WeightSpec
    shape: tuple[int, ...]

    @classmethod
    def of(cls, grid: Grid, values: Tensor) -> "QuantizedTensor":
        """The codes of `values` (rows, columns), float32, which must be values of this grid."""
        return cls(grid.encode(values, grid.scale, grid.spec, grid.segments), grid.scales, grid.spec, grid.shape)

    @property
    def scale(self) -> Tensor:
        """Float32 scales, (scale rows, scale columns)."""
        return self.scales.decode()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        parts = (self.codes, self.scales.stored, self.scales.base)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded tensor, of shape `shape`: decoded and scaled in float32, then cast to `dtype`."""
        return dequantize(self.codes, self.scale, self.spec, self.shape, dtype)


def quantize_tensor(
    weight: Tensor, format: str, granularity: str = "group:64", scale: str = "absmax", store: str = "bf16"
) -> QuantizedTensor:
    """Fit scales to a weight (out, in, ...), any float dtype, and round it to the nearest codes of a format.

    A convolution's groups are N consecutive input channels of one position of its kernel (`to_matrix`).
    Raises UsageError for unknown names, for NaN or infinite weights, and for tensors of one dimension.
    """
    return quantize(weight, WeightSpec.parse(format, granularity, scale, store))


def quantize(weight: Tensor, spec: WeightSpec) -> QuantizedTensor:
    """`quantize_tensor` of a weight (out, in, ...) for a specification already parsed."""
    if spec.scale in DATA_RULES:
        raise UsageError(f"scale rule '{spec.scale}' needs calibration data; without data use {' or '.join(RULES)}")
    if weight.ndim < 2:
        raise UsageError(f"a weight has output and input channels; this tensor has the shape {tuple(weight.shape)}")
    shape = tuple(weight.shape)
    matrix, segments = to_matrix(weight.detach(), spec.split), spec.segments(shape)
    rows, columns = matrix.shape
    parts = _parts(rows, columns, spec.granularity)
    # Results are allocated before the temporary tensors of a part, so that memory peaks near their size.
    codes = matrix.new_empty(rows, packed_size(columns, spec.fmt.bits), dtype=torch.uint8)
    stored = matrix.new_empty(spec.scale_shape(shape), dtype=get_store(spec.store).dtype)
    amplitude = torch.cat([absmax(to_groups(matrix[part].float(), spec.granularity, segments)) for part in parts])
    check_finite(amplitude)
    base, grid = get_store(spec.store).base(amplitude, spec.fmt), spec.grid_type
    for part in parts:
        exact = matrix[part].float()
        own = base if base is None or len(base) == 1 else base[part]
        scales = grid.fit(exact, spec, segments, own)
        if own is not None:  # a store of few octaves searches it
            own.copy_(scales.base)
        stored[part], codes[part] = scales.stored, grid.encode(exact, scales.decode(), spec, segments)
    return QuantizedTensor(codes, Scales(stored, base, spec.store), spec, shape)


def check_finite(values: Tensor, where: str = "") -> None:
    """Raise UsageError for NaN or infinity among weights of any shape, and for weights without values (device meta)."""
    if values.is_meta or not torch.isfinite(values).all():
        raise UsageError(f"{where}the weights hold NaN or infinity, or none (device meta): they cannot be quantized")


def _parts(rows: int, columns: int, granularity: Granularity) -> list[slice]:
    """Ranges of rows to quantize one after another; all rows together where they share their scale."""
    size = rows if granularity.kind == "tensor" else max(1, _PART // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight of this shape, in `dtype`, of packed codes (rows, bytes) and decoded float32 scales.

    Decoded and scaled in float32, then rounded once to `dtype`: the definition of a quantized weight.
    """
    matrix = spec.grid_type.decode(codes, scale, spec, spec.segments(shape))
    return from_matrix(matrix, shape, spec.split).to(dtype)
