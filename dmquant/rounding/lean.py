"""LeanQuant: a grid fitted where the error of GPTQ will be dearest.

Zhang and Shrivastava, "LeanQuant: Accurate and Scalable Large Language Model Quantization with Loss-error-aware Grid",
arXiv 2407.10032, section 3: with h_j the variance of input j given those rounded after it (the squared diagonal of the
Cholesky factor of the inverse moments), an error in column j costs its square over h_j.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmquant.grids import Grid
from dmquant.qtensor import WeightSpec
from dmquant.rounding.gptq import Factor, solve
from dmquant.scaling import Scales

POWERS = (0, 1, 2, 4)


def fit_lean(matrix: Tensor, spec: WeightSpec, shape: tuple[int, ...], factors: Sequence[Factor]) -> Grid:
    """The grid with scales, or tables, of least error under the weights h^-p, and what GPTQ gives on it.

    p is the one of POWERS with which that has the least error. `factors` are GPTQ's of one block of columns after
    another and `matrix` is (rows, columns), both in the order of the matrix form of a weight of this `shape`.
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
    """Scales, or tables, of least error under the weights h^-power."""
    return spec.grid_type.fit_weighted(matrix, spec, spec.segments(shape), column_weights(factors, power))


def column_weights(factors: Sequence[Factor], power: float) -> Tensor:
    """h^-power of every column in the order of the moments, (columns,) float64; their geometric mean is 1."""
    logarithms = []
    for factor in factors:
        logarithm = torch.empty_like(factor.upper.diagonal(), dtype=torch.float64)
        logarithm[factor.order] = 2 * factor.upper.diagonal().double().log()
        logarithms.append(logarithm)
    logarithm = torch.cat(logarithms)
    return torch.exp(-power * (logarithm - logarithm.mean()))
