"""A table of 16 small integers for every group of inputs: a format's values times the group's scale, rounded to 8 bits.

comfy-kitchen's `asym_w4a8_int8`: kernels multiply the integers, and each output has one float32 scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmquant.errors import UsageError
from dmquant.formats import LookupFormat, get_format
from dmquant.grids.base import Spec
from dmquant.grids.scaled import ScaledGrid
from dmquant.grids.table import SIZE, TableGrid, look_up, nearest_entries
from dmquant.packing import pack, unpack
from dmquant.scaling import Scales, absmax, to_groups
from dmquant.stores import LEVELS, get_store

LARGEST = 127  # of the integers


@dataclass(frozen=True)
class LevelGrid(TableGrid):
    """The integers of each group, ascending, times the scale of the output."""

    @staticmethod
    def check(format: str, granularity: str, scale: str) -> None:
        fmt = get_format(format)
        if not isinstance(fmt, LookupFormat) or len(fmt.table) != SIZE or not granularity.startswith("group:"):
            raise UsageError(
                f"store: levels goes with a lut4 format and granularity: group:N, not {format}, {granularity}"
            )
        if scale not in ("mse", "lean"):
            raise UsageError(f"scales of levels are fitted by scale: mse or lean, not {scale}")

    @staticmethod
    def scale_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, int]:
        if any(part % spec.granularity.size for part in spec.segments(shape)):
            raise UsageError(f"store: levels takes inputs in whole groups of {spec.granularity.size}, not {shape[1]}")
        return ScaledGrid.scale_shape(spec, shape)

    @staticmethod
    def fit(matrix: Tensor, spec: Spec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
        alike = torch.ones(matrix.shape[1], device=matrix.device, dtype=torch.float32)
        return fit_levels(matrix, spec, base, [alike])[0]

    @staticmethod
    def encode(values: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        tables = levels_of(scale, spec.fmt.values)
        codes = nearest_entries(values.reshape(len(tables), -1), tables).to(torch.uint8)
        return pack(codes.view(values.shape), spec.fmt.bits)

    @staticmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        indices, tables = unpack(codes, spec.fmt.bits, sum(segments)), levels_of(scale, spec.fmt.values)
        return look_up(indices.reshape(len(tables), -1), tables).view(indices.shape)

    @cached_property
    def tables(self) -> Tensor:
        return levels_of(self.scale, self.spec.fmt.values)

    def tables_of(self, column: int) -> Tensor:
        return self.tables.view(len(self.weight), -1, SIZE)[:, column // self.spec.granularity.size].contiguous()


def levels_of(scale: Tensor, values: Tensor) -> Tensor:
    """Tables (rows * groups, SIZE), float32, by scales of groups and last that of the output, (rows, groups + 1)."""
    whole = (values.to(scale) * scale[:, :-1, None]).round().clamp(-LARGEST, LARGEST)
    return (whole * scale[:, -1:, None]).flatten(0, 1)


def fit_levels(matrix: Tensor, spec: Spec, base: Tensor | None, weights: Sequence[Tensor]) -> list[Scales]:
    """The multiple of absmax of least squared error of each group, every column counting by its weight (columns,).

    `matrix` is float32 (rows, columns); a result for each of the weights.
    """
    store, groups = get_store(LEVELS), to_groups(matrix, spec.granularity)
    amplitude = absmax(groups)
    base = store.base(amplitude, spec.fmt) if base is None else base
    of_groups = [each.to(matrix).view(1, *groups.shape[1:]) for each in weights]
    found: list[list[Tensor]] = [[] for _ in weights]
    tried = [store.encode(amplitude * multiple, spec.fmt, base) for multiple in (1, *store.search)]
    for stored in tried:
        tables = levels_of(store.decode(stored, base), spec.fmt.values)
        flat = groups.flatten(0, 1)
        lost = (look_up(nearest_entries(flat, tables), tables) - flat).square_().view(groups.shape)
        for errors, weight in zip(found, of_groups, strict=True):
            errors.append((lost * weight).sum(-1))
    best = [torch.stack(errors).argmin(0, keepdim=True) for errors in found]
    return [Scales(torch.stack(tried).gather(0, each).squeeze(0), base, LEVELS) for each in best]
