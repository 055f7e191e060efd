"""A grid without structure: a table of 16 values for every row."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmquant.errors import UsageError
from dmquant.formats import NF4
from dmquant.grids.base import Grid, Spec
from dmquant.grids.kmeans import SIZE, fit_table, midpoints
from dmquant.packing import pack, unpack
from dmquant.scaling import Scales


@dataclass(frozen=True)
class TableGrid(Grid):
    """The entries of each row's table, (rows, SIZE) ascending; a code is the index of one."""

    @staticmethod
    def check(format: str, granularity: str, scale: str) -> None:
        if format.lower() != NF4.name or granularity != "channel":
            raise UsageError(
                "store: table is 16 values of each output channel: it goes with weights: lut4 and granularity: "
                f"channel, not {format} and {granularity}"
            )
        if scale not in ("mse", "lean"):
            raise UsageError(f"a table is fitted by scale: mse or lean, not {scale}")

    @staticmethod
    def scale_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], SIZE

    @staticmethod
    def fit(matrix: Tensor, spec: Spec, segments: tuple[int, ...], base: Tensor | None = None) -> Scales:
        return fit_table(matrix)

    @staticmethod
    def encode(values: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        return pack(_nearest_entries(values, scale).to(torch.uint8), spec.fmt.bits)

    @staticmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        return _look_up(unpack(codes, spec.fmt.bits, sum(segments)), scale)

    @cached_property
    def nearest(self) -> Tensor:
        return _look_up(_nearest_entries(self.weight, self.scale), self.scale)

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        matrix = self.weight.contiguous()
        lower = torch.searchsorted(self.scale, matrix, right=True).sub_(1).clamp_(min=0)
        upper = torch.searchsorted(self.scale, matrix).clamp_(max=SIZE - 1)
        return _look_up(lower, self.scale), _look_up(upper, self.scale)

    @cached_property
    def step(self) -> Tensor:
        """Distance of the two entries around each weight, (rows, columns); beyond an end, of the two entries there."""
        upper = torch.searchsorted(self.scale, self.weight.contiguous(), right=True).clamp_(1, SIZE - 1)
        return _look_up(upper, self.scale) - _look_up(upper - 1, self.scale)

    def round_column(self, values: Tensor, column: int) -> Tensor:
        return _look_up(_nearest_entries(values.unsqueeze(1), self.scale), self.scale).squeeze(1)


def _nearest_entries(matrix: Tensor, tables: Tensor) -> Tensor:
    """Index of the entry nearest to each element of (rows, columns), among ascending `tables` (rows, SIZE); int64."""
    return torch.searchsorted(midpoints(tables), matrix.contiguous())


def _look_up(indices: Tensor, tables: Tensor) -> Tensor:
    """The entries (rows, columns) that the indices (rows, columns) of each row stand for."""
    return tables.gather(1, indices.to(torch.int64))
