"""Weighted k-means in one dimension: 16 values for every row of a weight."""

import torch
from torch import Tensor

from dmquant.scaling import Scales
from dmquant.stores import TABLE

SIZE = 16  # values of a table
ITERATIONS = 100
_PART = 1 << 20  # weights at once


def fit_table(matrix: Tensor, weights: Tensor | None = None) -> Scales:
    """The table (SIZE values) of every row of least squared error, each column counting by its weight.

    `matrix` is float32 (rows, columns), `weights` (columns,), by default all the same; the tables are stored in
    bfloat16, (rows, SIZE), ascending. Lloyd's algorithm in one dimension: values belong to the nearest
    entry, entries move to the weighted mean of their values; on sorted rows both are sums between two places. From
    three starts, of which each row keeps the best.
    """
    columns = matrix.shape[1]
    weights = torch.ones(columns, device=matrix.device, dtype=torch.float32) if weights is None else weights
    weights = weights.double() / weights.double().sum()
    parts = matrix.split(max(1, _PART // columns))
    return Scales(torch.cat([_fit(part.double(), weights).bfloat16() for part in parts]), None, TABLE)


def midpoints(tables: Tensor) -> Tensor:
    """The midpoints (rows, SIZE - 1) between the entries of ascending tables (rows, SIZE)."""
    return ((tables[:, :-1] + tables[:, 1:]) / 2).contiguous()


def _fit(matrix: Tensor, weights: Tensor) -> Tensor:
    values, order = matrix.sort(1)
    zero = values.new_zeros(len(values), 1)
    mass = weights.expand_as(values).gather(1, order)
    sums = [torch.cat([zero, (mass * values**power).cumsum(1)], 1) for power in range(3)]
    # Evenly spaced; quantiles; and in proportion to the cube root of the density, which is best for many entries.
    even = values[:, :1].lerp(values[:, -1:], torch.linspace(0, 1, SIZE, dtype=values.dtype, device=values.device))
    gaps = torch.cat([zero, values.diff(dim=1)], 1)
    cube_root = (mass * gaps.square()).pow(1 / 3).cumsum(1)
    starts = [even, _quantiles(values, sums[0][:, 1:]), _quantiles(values, cube_root)]
    results = [_lloyd(values, sums, start) for start in starts]
    best = torch.stack([error for _, error in results]).argmin(0)
    return torch.stack([tables for tables, _ in results], 1)[torch.arange(len(values), device=values.device), best]


def _quantiles(values: Tensor, mass: Tensor) -> Tensor:
    """Quantiles (rows, SIZE) of sorted values (rows, columns): the middles of SIZE equal parts of a cumulative mass."""
    parts = (torch.arange(SIZE, dtype=mass.dtype, device=mass.device) + 0.5) / SIZE
    found = torch.searchsorted(mass.contiguous(), (parts * mass[:, -1:]).contiguous())
    return values.gather(1, found.clamp(max=values.shape[1] - 1))


def _lloyd(values: Tensor, sums: list[Tensor], tables: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (rows, SIZE), ascending, and their weighted squared errors (rows,)."""
    for _ in range(ITERATIONS):
        mass, first, _ = _between(values, sums, tables)
        moved = torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), tables).sort(1)[0]
        if torch.equal(moved, tables):
            break
        tables = moved
    mass, first, second = _between(values, sums, tables)
    return tables, (second - 2 * tables * first + tables.square() * mass).sum(1)


def _between(values: Tensor, sums: list[Tensor], tables: Tensor) -> list[Tensor]:
    """Weighted counts, sums and sums of squares, each (rows, SIZE), of the values that belong to each entry."""
    ends = torch.searchsorted(values, midpoints(tables), right=True)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], values.shape[1])], 1)
    return [sum_.gather(1, ends).diff(dim=1) for sum_ in sums]
