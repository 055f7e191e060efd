"""The interface of every grid: the values that the weights of one layer may take, and their codes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dmquant.scaling import Scales, from_matrix

Spec = Any
"""A `dmquant.qtensor.WeightSpec`, which is made with these grids."""


@dataclass(frozen=True)
class Grid(ABC):
    """A weight's matrix form (rows, columns), float32, with the scales or tables that say what values it may take.

    Values, neighbours and steps are float32 (rows, columns) in the unit of the weight.
    """

    weight: Tensor
    spec: Spec
    scales: Scales
    shape: tuple[int, ...]
    """Shape of the layer's weight, (rows, input channels, ...)."""
    solution: Tensor | None = None
    """GPTQ's values, float32 (rows, columns), where the scales were chosen by them, or learning begins with them."""
    wanted: Tensor | None = None
    """What the solution is the nearest to, (rows, columns): the best of each weight with all others as they are."""

    @staticmethod
    @abstractmethod
    def check(format: str, granularity: str, scale: str) -> None:
        """Raise UsageError for a format, granularity or scale rule that such a grid cannot have."""

    @staticmethod
    @abstractmethod
    def scale_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape (rows, columns) of the stored scales, or tables, of a weight of this shape."""

    @staticmethod
    @abstractmethod
    def fit(matrix: Tensor, spec: Spec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
        """Fit scales, or tables, to a float32 matrix (rows, columns) by the rule of its specification, without data.

        `base`, by default fitted to the matrix, is the base of the scales; a part of a weight is given the weight's.
        """

    @staticmethod
    @abstractmethod
    def encode(values: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        """Packed codes (rows, bytes), uint8, nearest to float32 values (rows, columns), by decoded scales or tables."""

    @staticmethod
    @abstractmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        """Values (rows, columns), float32, of packed codes (rows, bytes), by decoded scales or tables."""

    @property
    @abstractmethod
    def nearest(self) -> Tensor:
        """The values nearest to the weight, (rows, columns)."""

    @property
    @abstractmethod
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Adjacent values lower <= weight <= upper, (rows, columns); equal on the grid and beyond its ends."""

    @property
    @abstractmethod
    def step(self) -> Tensor:
        """Distance of the two values around each weight, (rows, columns); it varies in a float format."""

    @abstractmethod
    def round_column(self, values: Tensor, column: int) -> Tensor:
        """The grid's values (rows,) in one column nearest to float32 `values` (rows,), such as weights GPTQ moved."""

    def fraction(self) -> Tensor:
        """Position of each weight between its neighbours, (rows, columns), 0 to 1; 0 where they are equal."""
        lower, upper = self.neighbours
        gap = upper - lower
        return torch.where(gap > 0, (self.weight - lower) / gap, gap).clamp(0, 1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, columns) of this grid in the shape of the layer's weight; same dtype."""
        return from_matrix(matrix, self.shape, self.spec.split)

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Columns of the parts of a row that share no scale."""
        return self.spec.segments(self.shape)

    @cached_property
    def scale(self) -> Tensor:
        """Decoded scales (scale rows, scale columns) or tables (rows, entries), float32."""
        return self.scales.decode()
