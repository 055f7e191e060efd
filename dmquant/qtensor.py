"""A quantized tensor: packed codes and their scales, and the specification they were made by."""

import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

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

T = TypeVar("T")
_PART = {"cpu": 1 << 15}  # weights quantized at once: what stays in a core's cache, and where torch takes one thread
_PART_ELSEWHERE = 1 << 20
FASTER = "dmquant.cpu.quantizing"  # gives what `fit_and_round` gives on a CPU; by name alone, since it stands above


@dataclass(frozen=True)
class WeightSpec:
    """The quantization of a weight: its format, the elements that share a scale, the scale's rule and store."""

    fmt: Format
    granularity: Granularity
    scale: str
    store: str
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others share no scale."""
    amplitude: float | None = field(default=None, compare=False)
    """Where other layers share the scale, or base, of the whole tensor: the largest magnitude in all of them."""

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

    def base(self, amplitude: Tensor) -> Tensor | None:
        """The base for the largest magnitudes of groups, (rows, columns) float32; None where scales have none."""
        largest = amplitude if self.amplitude is None else amplitude.clamp(min=self.amplitude)
        return get_store(self.store).base(largest, self.fmt)


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
    matrix, shape = to_matrix(weight.detach(), spec.split), tuple(weight.shape)
    faster = importlib.import_module(FASTER).fit_and_round(matrix, spec, shape)
    codes, scales = faster or fit_and_round(matrix, spec, shape)
    return QuantizedTensor(codes, scales, spec, shape)


def fit_and_round(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...]) -> tuple[Tensor, Scales]:
    """Packed codes (rows, bytes) and scales of a matrix (rows, columns), any float dtype, that had `shape` as a weight.

    It is the definition. Raises UsageError for NaN or infinite weights.
    """
    (rows, columns), segments = matrix.shape, spec.segments(shape)
    size = max(1, _PART.get(matrix.device.type, _PART_ELSEWHERE) // columns)
    size = rows if spec.granularity.kind == "tensor" else size
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    # Results are allocated before the temporary tensors of a part, so that memory peaks near their size.
    codes = matrix.new_empty(rows, packed_size(columns, spec.fmt.bits), dtype=torch.uint8)
    stored = matrix.new_empty(spec.scale_shape(shape), dtype=get_store(spec.store).dtype)

    def measure(part: slice) -> Tensor:
        return absmax(to_groups(matrix[part].float(), spec.granularity, segments))

    def quantize_part(part: slice) -> None:
        exact = matrix[part].float().contiguous()  # the order of sums does not depend on how it lies in memory
        own = base if base is None or len(base) == 1 else base[part]
        scales = grid.fit(exact, spec, segments, own)
        if own is not None:  # a store of few octaves searches it
            own.copy_(scales.base)
        stored[part], codes[part] = scales.stored, grid.encode(exact, scales.decode(), spec, segments)

    amplitude = torch.cat(side_by_side(measure, parts, matrix.device))
    check_finite(amplitude)
    base, grid = spec.base(amplitude), spec.grid_type
    side_by_side(quantize_part, parts, matrix.device)
    return codes, Scales(stored, base, spec.store)


def side_by_side(work: Callable[[slice], T], parts: Sequence[slice], device: torch.device) -> list[T]:
    """The results of the work for all parts, on a CPU in as many threads as torch takes for one operation.

    Torch's own threads would wait for one another after each operation, most of the time where others keep CPUs busy.
    """
    inference = torch.is_inference_mode_enabled()  # which each thread has of its own

    def in_thread(part: slice) -> T:
        with torch.inference_mode(inference):
            return work(part)

    threads = min(torch.get_num_threads() if device.type == "cpu" else 1, len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(in_thread, parts))


def check_finite(values: Tensor, where: str = "") -> None:
    """Raise UsageError for NaN or infinity among weights of any shape, and for weights without values (device meta)."""
    # A sum is finite only if all its terms are, and takes one pass; it may overflow where they are.
    if values.is_meta or not (torch.isfinite(values.sum()) or torch.isfinite(values).all()):
        raise UsageError(f"{where}the weights hold NaN or infinity, or none (device meta): they cannot be quantized")


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight of this shape, in `dtype`, of packed codes (rows, bytes) and decoded float32 scales.

    Decoded and scaled in float32, then rounded once to `dtype`: the definition of a quantized weight.
    """
    matrix = spec.grid_type.decode(codes, scale, spec, spec.segments(shape))
    return from_matrix(matrix, shape, spec.split).to(dtype)
