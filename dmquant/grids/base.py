"""What every grid offers: the values that the weights of one layer may become, and codes of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dmquant.formats import Format
from dmquant.packing import packed_size
from dmquant.scaling import Granularity, Scales, from_matrix


class Spec(Protocol):
    """What a grid reads of a specification (`dmquant.qtensor.WeightSpec`)."""

    fmt: Format
    granularity: Granularity
    scale: str
    store: str
    split: int | None

    def segments(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Columns of the parts of a row that share no scale, in the matrix form of a weight of this shape."""
        ...


@dataclass(frozen=True)
class Grid(ABC):
    """A weight's matrix form (rows, columns), float32, with the scales or tables that say what values it may take.

    Values, neighbours and steps are float32 (rows, columns) in the unit of the weight.
    """

    weight: Tensor
    spec: Spec
    scales: Scales
    shape: tuple[int, ...]
    """Of the layer's weight, (rows, input channels, ...)."""
    solution: Tensor | None = None
    """Values that GPTQ gives, where the scales were chosen by them."""

    @staticmethod
    @abstractmethod
    def check(format: str, granularity: str, scale: str) -> None:
        """UsageError for a format, granularity or scale rule that there is no such grid of."""

    @staticmethod
    @abstractmethod
    def scale_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the stored scales, or tables, of a weight of this shape."""

    @staticmethod
    @abstractmethod
    def fit(matrix: Tensor, spec: Spec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
        """Scales, or tables, of a float32 matrix (rows, columns) by the rule of its specification, without data.

        `base`, by default its own, is what the stored scales are relative to where the matrix is part of a weight.
        """

    @staticmethod
    @abstractmethod
    def fit_weighted(matrix: Tensor, spec: Spec, segments: tuple[int, ...], weights: Tensor) -> Scales:
        """Scales, or tables, of least squared error when each column counts by its weight, (columns,) float64."""

    @staticmethod
    @abstractmethod
    def encode(values: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        """Packed codes (rows, bytes), uint8, of what is nearest to float32 values, by decoded scales or tables."""

    @staticmethod
    @abstractmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        """What packed codes stand for, (rows, columns) float32, by decoded scales or tables."""

    @property
    @abstractmethod
    def nearest(self) -> Tensor:
        """The nearest values."""

    @property
    @abstractmethod
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The adjacent values lower <= weight <= upper; equal where the weight is on its grid or beyond its end."""

    @property
    @abstractmethod
    def step(self) -> Tensor:
        """Distance between the two values around each weight: it differs from weight to weight in a float format."""

    @abstractmethod
    def round_column(self, values: Tensor, column: int) -> Tensor:
        """The nearest values (rows,) of the grid in one column to any others, such as weights that were moved."""

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales of the weight take."""
        return len(self.weight) * packed_size(self.weight.shape[1], self.spec.fmt.bits) + self.scales.nbytes

    def fraction(self) -> Tensor:
        """Where each weight lies between its neighbours, 0 to 1; 0 where they are equal."""
        lower, upper = self.neighbours
        gap = upper - lower
        return torch.where(gap > 0, (self.weight - lower) / gap, gap).clamp(0, 1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix of this grid in the shape of the layer's weight."""
        return from_matrix(matrix, self.shape, self.spec.split)

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Columns of the parts of a row that share no scale."""
        return self.spec.segments(self.shape)

    @cached_property
    def scale(self) -> Tensor:
        """Decoded scales or tables, float32."""
        return self.scales.decode()
