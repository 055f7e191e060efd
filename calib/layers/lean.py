"""LeanQuant: a grid with the least error where errors of GPTQ cost most.

Zhang and Shrivastava, "LeanQuant: Accurate and Scalable Large Language Model Quantization with Loss-error-aware Grid",
arXiv 2407.10032, section 3: with h_j the variance of input j given those rounded after it (the squared diagonal of the
Cholesky factor of the inverse moments), an error in column j costs its square over h_j.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmquant.formats import Format
from dmquant.grids import Grid, ScaledGrid, TableGrid
from dmquant.grids.kmeans import fit_table
from dmquant.qtensor import WeightSpec
from dmquant.rounding.gptq import Factor, solve
from dmquant.scaling import Scales, search, to_groups
from dmquant.stores import OCTAVE_SEARCH, STORES

POWERS = (0, 1, 2, 4)


def fit_lean(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], factors: Sequence[Factor]) -> Grid:
    """The grid with scales, or tables, of least error under the weights h^-p, and GPTQ's solution on it.

    p is the one of POWERS whose solution has the least error. `matrix` (rows, columns) float32 is the matrix form of a
    weight of this `shape`, and `factors` are GPTQ's factors of one block of its columns after another.
    """
    best, least = None, float("inf")
    for power in POWERS:
        grid = spec.grid_type(matrix, spec, scales_of(matrix, spec, shape, factors, power), shape)
        solution, error = solve(grid, factors)
        if best is None or error < least:
            best, least = replace(grid, solution=solution), error
    return best


def scales_of(
    matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], factors: Sequence[Factor], power: float
) -> Scales:
    """Scales, or tables, of least error of `matrix` (rows, columns) under the weights h^-power of its columns."""
    return WEIGHTED[spec.grid_type](matrix, spec, spec.segments(shape), column_weights(factors, power))


def column_weights(factors: Sequence[Factor], power: float) -> Tensor:
    """h^-power of every column in the order of the moments, (columns,) float64; their geometric mean is 1."""
    logarithms = []
    for factor in factors:
        logarithm = torch.empty_like(factor.upper.diagonal(), dtype=torch.float64)
        logarithm[factor.order] = 2 * factor.upper.diagonal().double().log()
        logarithms.append(logarithm)
    logarithm = torch.cat(logarithms)
    return torch.exp(-power * (logarithm - logarithm.mean()))


def weighted_scales(matrix: Tensor, spec: WeightSpec, segments: tuple[int, ...], weights: Tensor) -> Scales:
    """Scales of least squared error of `matrix` (rows, columns), with weights of its columns, (columns,) float64."""
    rows = len(matrix) if spec.granularity.kind == "tensor" else 1
    of_groups = to_groups(weights.expand(rows, -1), spec.granularity, segments)
    of_groups = of_groups / of_groups.amax(-1, keepdim=True)  # in float64, so that no group's all become 0
    groups = to_groups(matrix, spec.granularity, segments)
    return fit_weighted(groups, spec.fmt, spec.store, of_groups.float())


def fit_weighted(groups: Tensor, fmt: Format, store: str, weights: Tensor) -> Scales:
    """The multiple of absmax with the least squared weight error, every element counting by its weight.

    `groups` is (rows, scale columns, n) float32 and `weights`, float32, broadcast to it. The weights of a few elements
    may exceed all others, so multiples that clip more are tried too.
    """
    further = (0.125,) if STORES[store].search == OCTAVE_SEARCH else (0.3, 0.35, 0.4, 0.45, 0.5, 0.55)
    return search(groups, fmt, store, lambda error: error.square_().mul_(weights).sum(-1), further=further)


WEIGHTED = {
    ScaledGrid: weighted_scales,
    TableGrid: lambda matrix, spec, segments, weights: fit_table(matrix, weights),
}
