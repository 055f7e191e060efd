"""A quantized tensor: packed codes and their scales, and the specification they were made by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmquant.errors import UsageError
from dmquant.formats import Format, get_format
from dmquant.packing import pack, packed_size, unpack
from dmquant.scaling import (
    BLOCK_FORMATS,
    DATA_RULES,
    RULES,
    STORES,
    Granularity,
    Scales,
    absmax,
    check_choice,
    from_groups,
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

    @classmethod
    def parse(
        cls, format: str, granularity: str = "group:64", scale: str = "absmax", store: str = "bf16"
    ) -> "WeightSpec":
        """Checked; a block format such as `mxfp4` brings its own granularity and store."""
        if block := BLOCK_FORMATS.get(format.lower()):
            format, granularity, store = block.format, block.granularity, block.store
        if granularity == "token":
            raise UsageError("granularity 'token' is for activations: use tensor, channel or group:N for weights")
        return cls(
            get_format(format),
            Granularity.parse(granularity),
            check_choice("scale rule", scale, (*RULES, *DATA_RULES)),
            check_choice("scale storage", store, STORES),
        )

    @property
    def rule(self) -> Callable[..., Scales]:
        """The function that fits scales without data."""
        return RULES[self.scale]

    def with_format(self, fmt: Format) -> "WeightSpec":
        """The same but for the format."""
        return replace(self, fmt=fmt)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Scale rows and scale columns of a (rows, columns) matrix."""
        if self.granularity.kind == "tensor":
            return 1, 1
        return rows, math.ceil(columns / (self.granularity.size or columns))

    def base_shape(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Shape of the float32 base that the stored scales are relative to, or None."""
        return {"pow2": (self.scale_shape(rows, columns)[0], 1), "e4m3": (1, 1)}.get(self.store)


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

    Trailing dimensions count as one, in memory order: a convolution's groups run over (in, height, width).
    Raises UsageError for unknown names and for NaN or infinite weights.
    """
    return quantize(weight, WeightSpec.parse(format, granularity, scale, store))


def quantize(weight: Tensor, spec: WeightSpec) -> QuantizedTensor:
    """`quantize_tensor` for a specification already parsed."""
    if spec.scale in DATA_RULES:
        raise UsageError(f"scale rule '{spec.scale}' needs calibration data; without data use {' or '.join(RULES)}")
    matrix = weight.detach().reshape(len(weight), -1)
    rows, columns = matrix.shape
    parts, store = _parts(rows, columns, spec.granularity), STORES[spec.store]
    # The results first, then what a part needs for a while: so that memory peaks near the size of the results.
    codes = matrix.new_empty(rows, packed_size(columns, spec.fmt.bits), dtype=torch.uint8)
    stored = matrix.new_empty(spec.scale_shape(rows, columns), dtype=store.dtype)
    amplitude = torch.cat([absmax(to_groups(matrix[part].float(), spec.granularity)) for part in parts])
    if not torch.isfinite(amplitude).all():
        raise UsageError("the weights hold NaN or infinite values: they cannot be quantized")
    base = store.base(amplitude, spec.fmt)
    for part in parts:
        exact = matrix[part].float()
        base_of_part = base if base is None or len(base) == 1 else base[part]
        scales = spec.rule(to_groups(exact, spec.granularity), spec.fmt, spec.store, base_of_part)
        stored[part], codes[part] = scales.stored, encode(exact, scales.decode(), spec)
    return QuantizedTensor(codes, Scales(stored, base, spec.store), spec, tuple(weight.shape))


def _parts(rows: int, columns: int, granularity: Granularity) -> list[slice]:
    """Ranges of rows to quantize one after another; all rows together where they share their scale."""
    size = rows if granularity.kind == "tensor" else max(1, _PART // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def encode(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Packed nearest codes (rows x bytes) of a float32 matrix under float32 scales."""
    groups = to_groups(matrix, spec.granularity)
    codes = spec.fmt.encode(groups / scale.unsqueeze(-1))
    return pack(from_groups(codes, *matrix.shape), spec.fmt.bits)


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What packed codes and float32 scales stand for; this defines the meaning of a quantized weight."""
    rows = shape[0]
    columns = torch.Size(shape).numel() // rows
    values = spec.fmt.decode(unpack(codes, spec.fmt.bits, columns))
    groups = to_groups(values, spec.granularity) * scale.unsqueeze(-1)
    return from_groups(groups, rows, columns).reshape(shape).to(dtype)
