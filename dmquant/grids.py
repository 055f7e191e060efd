"""The values that the weights of one layer may become: a format, and scales or tables that are fitted and fixed."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmquant import tables
from dmquant.qtensor import QuantizedTensor, WeightSpec, encode, from_matrix
from dmquant.scaling import Scales, from_groups, to_groups


@dataclass(frozen=True)
class Grid:
    """A weight's matrix form (rows, columns) in float32, with the specification and scales of its quantized form."""

    weight: Tensor
    spec: WeightSpec
    scales: Scales
    shape: tuple[int, ...]
    """Of the layer's weight, (rows, input channels, ...)."""
    solution: Tensor | None = None
    """Values that GPTQ gives, where the scales were chosen by them."""

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The adjacent values lower <= weight <= upper; equal where the weight is on its grid or beyond its end."""
        if self.spec.has_table:
            return tables.neighbours(self.weight, self._scale)
        lower, upper = self.spec.fmt.neighbours(self._scaled)
        return self._unscaled(lower), self._unscaled(upper)

    @cached_property
    def nearest(self) -> Tensor:
        """The nearest values."""
        if self.spec.has_table:
            return tables.look_up(tables.nearest_entries(self.weight, self._scale), self._scale)
        return self._unscaled(self.spec.fmt.round(self._scaled))

    @cached_property
    def step(self) -> Tensor:
        """Distance between the two values around each weight: it differs from weight to weight in a float format."""
        if self.spec.has_table:
            return tables.step(self.weight, self._scale)
        return self._unscaled(self.spec.fmt.step(self._scaled))

    def round_column(self, values: Tensor, column: int) -> Tensor:
        """The nearest values (rows,) of the grid in one column to any others, such as weights that were moved."""
        if self.spec.has_table:
            return tables.look_up(tables.nearest_entries(values.unsqueeze(1), self._scale), self._scale).squeeze(1)
        scale = self._scale_of_columns[column]
        return self.spec.fmt.round(values / scale) * scale

    def quantized(self, values: Tensor) -> QuantizedTensor:
        """Codes of `values`, which must be values of this grid."""
        codes = encode(values, self._scale, self.spec, self._segments)
        return QuantizedTensor(codes, self.scales, self.spec, self.shape)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix of this grid in the shape of the layer's weight."""
        return from_matrix(matrix, self.shape, self.spec.split)

    @cached_property
    def _segments(self) -> tuple[int, ...]:
        return self.spec.segments(self.shape)

    @cached_property
    def _scale(self) -> Tensor:
        return self.scales.decode()

    @cached_property
    def _scale_of_columns(self) -> Tensor:
        """The scale of every weight, (columns, rows)."""
        groups = to_groups(torch.empty_like(self.weight), self.spec.granularity, self._segments)
        scale = self._scale.unsqueeze(-1).expand_as(groups)
        return from_groups(scale, self.spec.granularity, self._segments).T.contiguous()

    @property
    def _scaled(self) -> Tensor:
        return to_groups(self.weight, self.spec.granularity, self._segments) / self._scale.unsqueeze(-1)

    def _unscaled(self, groups: Tensor) -> Tensor:
        return from_groups(groups * self._scale.unsqueeze(-1), self.spec.granularity, self._segments)

    def fraction(self) -> Tensor:
        """Where each weight lies between its neighbours, 0 to 1; 0 where they are equal."""
        lower, upper = self.neighbours
        gap = upper - lower
        return torch.where(gap > 0, (self.weight - lower) / gap, gap).clamp(0, 1)
