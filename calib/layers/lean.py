"""LeanQuant: a grid with the least error where errors of GPTQ cost most.

Zhang and Shrivastava, "LeanQuant: Accurate and Scalable Large Language Model Quantization with Loss-error-aware Grid",
arXiv 2407.10032, section 3: with 1 / h_j the variance of input j given those rounded after it (h_j is the squared
diagonal of the Cholesky factor of the inverse moments), an error in column j costs its square over h_j.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmquant.cpu.solving import search_weighted
from dmquant.exchange.levels import LevelGrid, fit_levels
from dmquant.formats import Format
from dmquant.grids import Grid, ScaledGrid, TableGrid
from dmquant.grids.kmeans import fit_table
from dmquant.qtensor import WeightSpec
from dmquant.rounding.gptq import Factor, solve
from dmquant.scaling import Scales, absmax, fit_absmax, search, to_groups
from dmquant.stores import OCTAVE_SEARCH, STORES

POWERS = (0, 1, 2, 4)
_STACKED = 4096  # rows that are solved at once: beyond, a matrix product gains nothing and takes memory


def fit_lean(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], factors: Sequence[Factor]) -> Grid:
    """The grid with scales, or tables, of least error under the weights h^-p, and GPTQ's solution on it.

    p is the one of POWERS whose solution has the least error: for each row alone where rows have scales of their own.
    `matrix` (rows, columns) float32 is the matrix form of a weight of this `shape`, and `factors` are GPTQ's factors
    of one block of its columns after another.
    """
    tried = scales_of(matrix, spec, shape, factors, POWERS)
    rows, stored = len(matrix), torch.stack([scales.stored for scales in tried])
    if stored.shape[1] == rows:
        parts = torch.arange(rows, device=matrix.device).split(_STACKED // len(POWERS))
        solved = [_solve_each(matrix, spec, shape, tried, part, factors) for part in parts]
        values, errors = (torch.cat(each, 1) for each in zip(*solved, strict=True))
        best = errors.argmin(0)
    else:
        solved = [solve(spec.grid_type(matrix, spec, scales, shape), factors) for scales in tried]
        values, errors = (torch.stack(each) for each in zip(*solved, strict=True))
        best = errors.sum(1).argmin().expand(rows)

    def chosen(each: Tensor) -> Tensor:
        """Of (tried, rows or 1, ...) what is best."""
        count = each.shape[1]
        return each[best[:count], torch.arange(count, device=each.device)]

    bases = [scales.base for scales in tried]
    base = None if bases[0] is None else chosen(torch.stack(bases))
    return spec.grid_type(matrix, spec, Scales(chosen(stored), base, spec.store), shape, chosen(values))


def _solve_each(
    matrix: Tensor,
    spec: WeightSpec,
    shape: tuple[int, ...],
    tried: Sequence[Scales],
    rows: Tensor,
    factors: Sequence[Factor],
) -> tuple[Tensor, Tensor]:
    """GPTQ of some rows by each of the scales `tried`, as one weight of all their rows.

    Returns values (tried, rows, columns) and errors (tried, rows).
    """
    weight, stored = matrix[rows].repeat(len(tried), 1), torch.cat([scales.stored[rows] for scales in tried])
    base = tried[0].base  # one for all, or one a row
    if base is not None and len(base) == len(matrix):
        base = torch.cat([scales.base[rows] for scales in tried])
    grid = spec.grid_type(weight, spec, Scales(stored, base, spec.store), (len(weight), *shape[1:]))
    values, errors = solve(grid, factors)
    return values.unflatten(0, (len(tried), -1)), errors.unflatten(0, (len(tried), -1))


def scales_of(
    matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], factors: Sequence[Factor], powers: Sequence[float]
) -> list[Scales]:
    """Scales, or tables, of least error of `matrix` (rows, columns) under the weights h^-p of its columns, by power."""
    weights = [column_weights(factors, power) for power in powers]
    return WEIGHTED[spec.grid_type](matrix, spec, spec.segments(shape), weights)


def column_weights(factors: Sequence[Factor], power: float) -> Tensor:
    """h^-power of every column in the order of the moments, (columns,) float64; their geometric mean is 1."""
    logarithms = []
    for factor in factors:
        logarithm = torch.empty_like(factor.root.diagonal(), dtype=torch.float64)
        logarithm[factor.order] = -2 * factor.root.diagonal().double().log()
        logarithms.append(logarithm)
    logarithm = torch.cat(logarithms)
    return torch.exp(-power * (logarithm - logarithm.mean()))


def weighted_scales(
    matrix: Tensor, spec: WeightSpec, segments: tuple[int, ...], weights: Sequence[Tensor]
) -> list[Scales]:
    """Scales of least squared error of `matrix` (rows, columns) for each of several weights of its columns, float64."""
    rows = len(matrix) if spec.granularity.kind == "tensor" else 1
    of_groups = torch.cat([to_groups(each.expand(rows, -1), spec.granularity, segments) for each in weights])
    of_groups = of_groups / of_groups.amax(-1, keepdim=True)  # in float64, so that no group's all become 0
    groups = to_groups(matrix, spec.granularity, segments)
    base = None if spec.amplitude is None else spec.base(absmax(groups))
    return fit_weighted(groups, spec.fmt, spec.store, of_groups.float(), base)


def fit_weighted(groups: Tensor, fmt: Format, store: str, weights: Tensor, base: Tensor | None = None) -> list[Scales]:
    """The multiple of absmax with the least squared weight error, every element counting by its weight.

    `groups` is (rows, scale columns, n) float32 and `weights` (weightings, scale columns, n) float32: a result for each
    weighting. `base` as in `fit_absmax`. The weights of a few elements may exceed all others, so multiples that clip
    more are tried too.
    """
    kind, absolute = STORES[store], fit_absmax(groups, fmt, store, base)
    further = (0.125,) if kind.search == OCTAVE_SEARCH else (0.3, 0.35, 0.4, 0.45, 0.5, 0.55)
    if not kind.factors and groups.device.type == "cpu":
        multiples = torch.tensor(kind.tried(fmt, *further), dtype=torch.float32).view(-1, 1, 1)
        tried = kind.encode(absmax(groups) * multiples, fmt, absolute.base)
        chosen = search_weighted(groups, fmt, kind.decode(tried, absolute.base), weights)
        if chosen is not None:
            return [Scales(tried.gather(0, each.unsqueeze(0)).squeeze(0), absolute.base, store) for each in chosen]
    return [
        search(groups, fmt, store, lambda error, each=each: error.square_().mul_(each).sum(-1), base, further)
        for each in weights
    ]


def _levels(matrix: Tensor, spec: WeightSpec, segments: tuple[int, ...], weights: Sequence[Tensor]) -> list[Scales]:
    return fit_levels(matrix, spec, None, weights)


def _tables(matrix: Tensor, spec: WeightSpec, segments: tuple[int, ...], weights: Sequence[Tensor]) -> list[Scales]:
    return [fit_table(matrix, each) for each in weights]


WEIGHTED = {ScaledGrid: weighted_scales, TableGrid: _tables, LevelGrid: _levels}
