"""A format's values times the scale of each group."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmquant.grids.base import Grid, Spec
from dmquant.packing import pack, unpack
from dmquant.scaling import RULES, Scales, absmax, fit_absmax, from_groups, to_groups


@dataclass(frozen=True)
class ScaledGrid(Grid):
    """The values of `spec.fmt` times the scale of each group."""

    @staticmethod
    def check(format: str, granularity: str, scale: str) -> None:
        """Every format has scales of every granularity by every rule."""

    @staticmethod
    def scale_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, int]:
        columns = sum(math.ceil(part / (spec.granularity.size or part)) for part in spec.segments(shape))
        return 1 if spec.granularity.kind == "tensor" else shape[0], columns

    @staticmethod
    def fit(matrix: Tensor, spec: Spec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
        groups = to_groups(matrix, spec.granularity, segments)
        if spec.amplitude is not None and spec.granularity.kind == "tensor":  # by no search: other layers share it
            return fit_absmax(absmax(groups).clamp(min=spec.amplitude).unsqueeze(-1), spec.fmt, spec.store)
        base = spec.base(absmax(groups)) if base is None and spec.amplitude is not None else base
        return RULES[spec.scale](groups, spec.fmt, spec.store, base)

    @staticmethod
    def encode(values: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        codes = spec.fmt.encode(to_groups(values, spec.granularity, segments) / scale.unsqueeze(-1))
        return pack(from_groups(codes, spec.granularity, segments), spec.fmt.bits)

    @staticmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        values = spec.fmt.decode(unpack(codes, spec.fmt.bits, sum(segments)))
        groups = to_groups(values, spec.granularity, segments) * scale.unsqueeze(-1)
        return from_groups(groups, spec.granularity, segments)

    @cached_property
    def nearest(self) -> Tensor:
        return self._unscaled(self.spec.fmt.round(self._scaled))

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        first, second = map(self._unscaled, self.spec.fmt.neighbours(self._scaled))
        return torch.minimum(first, second), torch.maximum(first, second)  # a negative scale turns them around

    @cached_property
    def step(self) -> Tensor:
        return self._unscaled(self.spec.fmt.step(self._scaled)).abs()

    def round_column(self, values: Tensor, column: int) -> Tensor:
        scale = self.scale_of_columns[column]
        return self.spec.fmt.round(values / scale) * scale

    @cached_property
    def scale_of_columns(self) -> Tensor:
        """The scale of every weight, (columns, rows)."""
        groups = to_groups(torch.empty_like(self.weight), self.spec.granularity, self.segments)
        scale = self.scale.unsqueeze(-1).expand_as(groups)
        return from_groups(scale, self.spec.granularity, self.segments).T.contiguous()

    @property
    def _scaled(self) -> Tensor:
        return to_groups(self.weight, self.spec.granularity, self.segments) / self.scale.unsqueeze(-1)

    def _unscaled(self, groups: Tensor) -> Tensor:
        return from_groups(groups * self.scale.unsqueeze(-1), self.spec.granularity, self.segments)
