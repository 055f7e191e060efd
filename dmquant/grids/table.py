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
        return pack(nearest_entries(values, scale).to(torch.uint8), spec.fmt.bits)

    @staticmethod
    def decode(codes: Tensor, scale: Tensor, spec: Spec, segments: tuple[int, ...]) -> Tensor:
        return look_up(unpack(codes, spec.fmt.bits, sum(segments)), scale)

    @cached_property
    def nearest(self) -> Tensor:
        return self._entries(nearest_entries(self._rows, self.tables))

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        lower = torch.searchsorted(self.tables, self._rows, right=True).sub_(1).clamp_(min=0)
        upper = torch.searchsorted(self.tables, self._rows).clamp_(max=SIZE - 1)
        return self._entries(lower), self._entries(upper)

    @cached_property
    def step(self) -> Tensor:
        """Distance of the two entries around each weight, (rows, columns); beyond an end, of the two entries there."""
        upper = torch.searchsorted(self.tables, self._rows, right=True).clamp_(1, SIZE - 1)
        return self._entries(upper) - self._entries(upper - 1)

    def round_column(self, values: Tensor, column: int) -> Tensor:
        tables = self.tables_of(column)
        return look_up(nearest_entries(values.unsqueeze(1), tables), tables).squeeze(1)

    @cached_property
    def tables(self) -> Tensor:
        """The tables (n, SIZE) of equal parts of the rows, one part after another."""
        return self.scale

    def tables_of(self, column: int) -> Tensor:
        """The tables (rows, SIZE) of one column."""
        return self.tables

    @property
    def _rows(self) -> Tensor:
        return self.weight.reshape(len(self.tables), -1).contiguous()

    def _entries(self, indices: Tensor) -> Tensor:
        return look_up(indices, self.tables).view(self.weight.shape)


def nearest_entries(matrix: Tensor, tables: Tensor) -> Tensor:
    """Index of the entry nearest to each element of (rows, columns), among ascending `tables` (rows, SIZE); int64."""
    return torch.searchsorted(midpoints(tables), matrix.contiguous())


def look_up(indices: Tensor, tables: Tensor) -> Tensor:
    """The entries (rows, columns) that the indices (rows, columns) of each row stand for."""
    return tables.gather(1, indices.to(torch.int64))
