"""GPTQ: round column by column, each time moving the weights that are left so that they make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
section 3.3 and algorithm 1, on any grid whose scales are fitted before and stay as they are. Its solution can be
refined by coordinate descent: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models",
arXiv 2309.01885, section 3.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dmquant.errors import UserError
from dmquant.grids import Grid
from dmquant.rounding.base import Fixed

LEARNS = False
NEEDS_MOMENTS = True
BLOCK = 128  # columns between two updates of all that are left
TRIES = 8  # dampings to try, each ten times the one before


class Options(BaseModel, extra="forbid"):
    """Options of GPTQ in a recipe."""

    damping: float = Field(default=0.01, gt=0)
    """The addition to the diagonal of the second moments, as a share of its mean."""
    order: Literal["activation", "given"] = "activation"
    """`activation`: columns of the largest inputs first. `given`: from the first column to the last."""
    columns: int = Field(default=8192, ge=1)
    """Wider layers are cut into blocks of at most so many columns, which are solved as if the others were exact."""
    sweeps: int = Field(default=0, ge=0)
    """Passes of coordinate descent over the solution; it ends before where a pass changes nothing."""


class Factor(NamedTuple):
    """The order of one block of n columns, and the upper Cholesky factor U of its inverse moments in that order.

    U^T U = H^-1: U_ii^2 is the variance of column i given the columns after it; an error there costs its square over
    U_ii^2. `order` (n,) int64 counts from the block's first column; `upper` is (n, n).
    """

    order: Tensor
    upper: Tensor


def start(grid: Grid, options: Options, moments: Sequence[Tensor]) -> Fixed:
    """GPTQ, then `options.sweeps` sweeps of coordinate descent over its values.

    `moments`: the second moments (n, n), sums or means, of the inputs of one block of n columns after another, in the
    order of the grid's columns. Raises UserError for moments that are not finite, or not positive definite when damped.
    """
    values = grid.solution
    if values is None:
        values, _ = solve(grid, factorize(moments, options))
    if options.sweeps:
        values = descend(grid, moments, options, values)
    return Fixed(grid, values)


def factorize(moments: Sequence[Tensor], options: Options) -> list[Factor]:
    """The factors of the damped moments (n, n) of every block of n columns, in their dtype.

    A column that no input reaches counts as independent of the others: it will be rounded to nearest. Raises UserError
    for moments that are not finite.
    """
    return [_factorize(block, options) for block in moments]


def _damping(moments: Tensor, options: Options) -> Tensor:
    return options.damping * moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)


def _factorize(moments: Tensor, options: Options) -> Factor:
    """The factor of one block, computed in float64 where the dtype of the moments is not precise enough."""
    diagonal = moments.diagonal()
    if not torch.isfinite(diagonal).all():
        raise UserError("the inputs of a layer hold NaN or infinity: calibrate in --dtype fp32 or bf16")
    order = torch.arange(len(diagonal), device=moments.device)
    if options.order == "activation":
        order = diagonal.argsort(descending=True, stable=True)
    damping = _damping(moments, options)
    for attempt, dtype in enumerate((moments.dtype, *(torch.float64,) * TRIES)):
        damped = moments[order[:, None], order].to(dtype)
        dead = damped.diagonal() == 0
        damped.diagonal().masked_fill_(dead, damping).add_(damping * 10 ** max(attempt - 1, 0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and torch.isfinite(upper.diagonal()).all():
            return Factor(order, upper.to(moments.dtype))
    raise UserError("the second moments of a layer's inputs are not positive definite: raise rounding.damping")


def solve(grid: Grid, factors: Sequence[Factor]) -> tuple[Tensor, float]:
    """GPTQ (arXiv 2210.17323, algorithm 1): values of the grid, (rows, columns) float32, and their error.

    The error is tr((W - Q) (H + damping) (W - Q)^T), with H zero between blocks of columns.
    """
    values, error, first = torch.empty_like(grid.weight), 0.0, 0
    for factor in factors:
        last = first + len(factor.order)
        values[:, first:last], of_block = _solve(grid, factor, first, last)
        error, first = error + of_block, last
    return values, error


def _solve(grid: Grid, factor: Factor, start: int, stop: int) -> tuple[Tensor, float]:
    """Values (rows, n) of the n columns from `start` to `stop`, and their error."""
    order, upper = factor
    left = grid.weight[:, start:stop].T[order].to(upper.dtype)  # columns first: each is contiguous
    values = torch.empty_like(left, dtype=torch.float32)
    errors, error = torch.empty_like(left[:BLOCK]), torch.zeros((), dtype=torch.float64, device=left.device)
    columns = (order + start).tolist()
    for first in range(0, len(columns), BLOCK):
        block = left[first : first + BLOCK]
        last, made = first + len(block), errors[: len(block)]
        inside = upper[first:last, first:last]
        for index, column in enumerate(block):
            values[first + index] = grid.round_column(column.float(), columns[first + index])
            made[index] = (column - values[first + index]) / inside[index, index]
            block[index + 1 :].addr_(inside[index, index + 1 :], made[index], alpha=-1)
        left[last:].addmm_(upper[first:last, last:].T, made, alpha=-1)
        error += made.double().square().sum()
    unsorted = torch.empty_like(values)
    unsorted[order] = values
    return unsorted.T, error.item()


def descend(grid: Grid, moments: Sequence[Tensor], options: Options, values: Tensor) -> Tensor:
    """QuantEase: `values` (rows, columns) after passes in which every weight in turn takes its best value.

    The best value of w_j with all others as they are is the one nearest to q_j + (H (w - q))_j / H_jj, so the error
    never grows: arXiv 2309.01885, eq. 4 and algorithm 1, with GPTQ's damping, at most `options.sweeps` times.
    """
    values, first = values.clone(), 0
    for block in moments:
        last = first + len(block)
        _descend(grid, block, _damping(block, options), options.sweeps, values[:, first:last], first)
        first = last
    return values


def _descend(grid: Grid, moments: Tensor, damping: Tensor, sweeps: int, values: Tensor, start: int) -> None:
    """Change the `values` (rows, columns) of one block of columns, from column `start` of the grid, in place."""
    now = values.T.to(moments.dtype).contiguous()  # columns first: each is contiguous
    target = grid.weight[:, start : start + len(now)].T.to(moments.dtype)
    for _ in range(sweeps):
        slope, changed = torch.addmm(damping * (target - now), moments, target - now), False
        for first in range(0, len(now), BLOCK):
            block, last = slice(first, first + BLOCK), min(first + BLOCK, len(now))
            inside = moments[block, block].clone()
            inside.diagonal().add_(damping)
            moved = torch.zeros_like(now[block])
            for index, column in enumerate(now[block]):
                best = column + slope[first + index] / inside[index, index]
                moved[index] = grid.round_column(best.float(), start + first + index) - column
                slope[block].addr_(inside[index], moved[index], alpha=-1)
                column += moved[index]
            slope[:first].addmm_(moments[:first, block], moved, alpha=-1)
            slope[last:].addmm_(moments[last:, block], moved, alpha=-1)
            changed |= bool(moved.any())
        if not changed:
            break
    values.copy_(now.T)
