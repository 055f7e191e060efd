"""A quantized tensor: packed codes and their scales, and the specification they were made by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmquant import tables
from dmquant.errors import UsageError
from dmquant.formats import NF4, Format, get_format
from dmquant.packing import pack, packed_size, unpack
from dmquant.scaling import (
    BLOCK_FORMATS,
    DATA_RULES,
    RULES,
    STORES,
    TABLE,
    Granularity,
    Scales,
    absmax,
    check_choice,
    from_groups,
    stored_dtype,
    to_groups,
)

_PART = 1 << 20  # weights quantized at once


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is quantized: format, which elements share a scale, how the scale is chosen and stored."""

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
        """Checked; a block format such as `mxfp4` brings its own granularity and store."""
        if block := BLOCK_FORMATS.get(format.lower()):
            format, granularity, store = block.format, block.granularity, block.store
        if granularity == "token":
            raise UsageError("granularity 'token' is for activations: use tensor, channel or group:N for weights")
        check_table(format, granularity, scale, store)
        return cls(
            get_format(format),
            Granularity.parse(granularity),
            check_choice("scale rule", scale, (*RULES, *DATA_RULES)),
            check_choice("scale storage", store, (*STORES, TABLE)),
            split,
        )

    @property
    def has_table(self) -> bool:
        """Whether every row has values of its own, and codes are their indices; there are no scales then."""
        return self.store == TABLE

    @property
    def rule(self) -> Callable[..., Scales]:
        """The function that fits scales without data."""
        return RULES[self.scale]

    def with_format(self, fmt: Format) -> "WeightSpec":
        """The same but for the format."""
        return replace(self, fmt=fmt)

    def segments(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Columns of the parts of a row that share no scale, in the matrix form of a weight of this shape."""
        columns = math.prod(shape[1:])
        if self.split is None:
            return (columns,)
        first = columns // shape[1] * self.split
        return first, columns - first

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Scale rows and scale columns of a weight of this shape; of its tables rows and values."""
        if self.has_table:
            return shape[0], tables.SIZE
        columns = sum(math.ceil(part / (self.granularity.size or part)) for part in self.segments(shape))
        return 1 if self.granularity.kind == "tensor" else shape[0], columns

    def base_shape(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Shape of the float32 base that the stored scales are relative to, or None.

        It is one for both halves of a split weight, so that a kernel can apply it to the sum of their products.
        """
        return {"pow2": (self.scale_shape(shape)[0], 1), "e4m3": (1, 1)}.get(self.store)


def check_table(fmt: str, granularity: str, scale: str, store: str) -> None:
    """UsageError for a table for other than 4-bit codes of whole rows, or that nothing fits."""
    if store != TABLE:
        return
    if fmt.lower() != NF4.name or granularity != "channel":
        raise UsageError(
            f"store: table is 16 values of each output channel: it goes with weights: lut4 and granularity: channel, "
            f"not {fmt} and {granularity}"
        )
    if scale not in ("mse", "lean"):
        raise UsageError(f"a table is fitted by scale: mse or lean, not {scale}")


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes packed by rows (uint8, rows x bytes), scales as stored, and the shape of the tensor they stand for."""

    codes: Tensor
    scales: Scales
    spec: WeightSpec
    shape: tuple[int, ...]

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
        """The tensor these codes stand for: decoded and scaled in float32, then cast to `dtype`."""
        return dequantize(self.codes, self.scale, self.spec, self.shape, dtype)


def quantize_tensor(
    weight: Tensor, format: str, granularity: str = "group:64", scale: str = "absmax", store: str = "bf16"
) -> QuantizedTensor:
    """Round a weight (output channels first) to the nearest codes of a format, its scales fitted first.

    A convolution's groups are N consecutive input channels of one position of its kernel (`to_matrix`).
    Raises UsageError for unknown names, for NaN or infinite weights, and for tensors of one dimension.
    """
    return quantize(weight, WeightSpec.parse(format, granularity, scale, store))


def to_matrix(weight: Tensor, split: int | None = None) -> Tensor:
    """The matrix form (rows, columns) of a weight (rows, input channels, ...), channels last.

    Columns run over the positions of the kernel and, within each, over the input channels, as an implicit GEMM reads
    them. With `split`, all columns of the first `split` channels come before those of the others.
    """
    if split is None or weight.ndim == 2:
        return weight.movedim(1, -1).flatten(1)
    return torch.cat([to_matrix(weight[:, :split]), to_matrix(weight[:, split:])], 1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], split: int | None = None) -> Tensor:
    """Undo `to_matrix`. A convolution's weight comes in the memory format channels last, as a view where it can."""
    rows, channels, *kernel = shape
    positions = math.prod(kernel)
    if positions == 1:
        return matrix.reshape(shape)
    if split is None:
        return matrix.unflatten(1, (*kernel, channels)).movedim(-1, 1)
    first, rest = matrix.split((split * positions, (channels - split) * positions), 1)
    halves = from_matrix(first, (rows, split, *kernel)), from_matrix(rest, (rows, channels - split, *kernel))
    return torch.cat(halves, 1)


def quantize(weight: Tensor, spec: WeightSpec) -> QuantizedTensor:
    """`quantize_tensor` for a specification already parsed."""
    if spec.scale in DATA_RULES:
        raise UsageError(f"scale rule '{spec.scale}' needs calibration data; without data use {' or '.join(RULES)}")
    if weight.ndim < 2:
        raise UsageError(f"a weight has output and input channels; this tensor has the shape {tuple(weight.shape)}")
    shape = tuple(weight.shape)
    matrix, segments = to_matrix(weight.detach(), spec.split), spec.segments(shape)
    rows, columns = matrix.shape
    parts = _parts(rows, columns, spec.granularity)
    # The results first, then what a part needs for a while: so that memory peaks near the size of the results.
    codes = matrix.new_empty(rows, packed_size(columns, spec.fmt.bits), dtype=torch.uint8)
    stored = matrix.new_empty(spec.scale_shape(shape), dtype=stored_dtype(spec.store))
    amplitude = torch.cat([absmax(to_groups(matrix[part].float(), spec.granularity, segments)) for part in parts])
    check_finite(amplitude)
    base = None if spec.has_table else STORES[spec.store].base(amplitude, spec.fmt)
    for part in parts:
        exact = matrix[part].float()
        base_of_part = base if base is None or len(base) == 1 else base[part]
        scales = fit(exact, spec, segments, base_of_part)
        stored[part], codes[part] = scales.stored, encode(exact, scales.decode(), spec, segments)
    return QuantizedTensor(codes, Scales(stored, base, spec.store), spec, shape)


def check_finite(values: Tensor) -> None:
    """UsageError for NaN or infinity among weights."""
    if not torch.isfinite(values).all():
        raise UsageError("the weights hold NaN or infinite values: they cannot be quantized")


def _parts(rows: int, columns: int, granularity: Granularity) -> list[slice]:
    """Ranges of rows to quantize one after another; all rows together where they share their scale."""
    size = rows if granularity.kind == "tensor" else max(1, _PART // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def fit(matrix: Tensor, spec: WeightSpec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
    """Scales or tables of a float32 matrix by the rule of its specification, without data."""
    if spec.has_table:
        return tables.fit_table(matrix)
    return spec.rule(to_groups(matrix, spec.granularity, segments), spec.fmt, spec.store, base)


def encode(matrix: Tensor, scale: Tensor, spec: WeightSpec, segments: tuple[int, ...]) -> Tensor:
    """Packed nearest codes (rows x bytes) of a float32 matrix under float32 scales or tables."""
    if spec.has_table:
        return pack(tables.nearest_entries(matrix, scale).to(torch.uint8), spec.fmt.bits)
    groups = to_groups(matrix, spec.granularity, segments)
    codes = spec.fmt.encode(groups / scale.unsqueeze(-1))
    return pack(from_groups(codes, spec.granularity, segments), spec.fmt.bits)


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What packed codes and float32 scales stand for; this defines the meaning of a quantized weight."""
    segments = spec.segments(shape)
    if spec.has_table:
        indices = unpack(codes, spec.fmt.bits, sum(segments))
        return from_matrix(tables.look_up(indices, scale), shape, spec.split).to(dtype)
    values = spec.fmt.decode(unpack(codes, spec.fmt.bits, sum(segments)))
    groups = to_groups(values, spec.granularity, segments) * scale.unsqueeze(-1)
    return from_matrix(from_groups(groups, spec.granularity, segments), shape, spec.split).to(dtype)
