"""GPTQ: round column by column, each time moving the weights that are left so that they make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
section 3.3 and algorithm 1, on any grid whose scales are fitted before and stay as they are. Its solution can be
refined by coordinate descent: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models",
arXiv 2309.01885, section 3.
"""

import importlib
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
FASTER = "dmquant.cpu.solving"  # `round_in_turn` on a CPU; by name alone, since it stands above


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
    """The order of one block of n columns, and the upper triangular root R of its damped moments in that order.

    H = R R^T: R_ii^2 is the variance of input i given those after it, and what an error there costs once the columns
    after it have made up for it. `order` (n,) int64 counts from the block's first column; `root` is (n, n).
    """

    order: Tensor
    root: Tensor


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
        damped = moments[order.flip(0)[:, None], order.flip(0)].to(dtype)  # backwards: its factor is a root R, flipped
        dead = damped.diagonal() == 0
        damped.diagonal().masked_fill_(dead, damping).add_(damping * 10 ** max(attempt - 1, 0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower.diagonal()).all():
            return Factor(order, lower.flip(0, 1).to(moments.dtype))
    raise UserError("the second moments of a layer's inputs are not positive definite: raise rounding.damping")


def solve(grid: Grid, factors: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv 2210.17323, algorithm 1): values of the grid, (rows, columns) float32, and errors (rows,) float64.

    The error of a row is (w - q) (H + damping) (w - q)^T, with H zero between blocks of columns.
    """
    values, first = torch.empty_like(grid.weight), 0
    errors = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for factor in factors:
        last = first + len(factor.order)
        values[:, first:last], of_block = _solve(grid, factor, first, last)
        errors, first = errors + of_block, last
    return values, errors


def _solve(grid: Grid, factor: Factor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Values (rows, n) of the n columns from `start` to `stop`, and their errors (rows,).

    With e = w - q, a row's error is |e R|^2, of which column i adds (sum over j <= i of e_j R_ji)^2: least where q_i is
    nearest to w_i + sum over j < i of e_j R_ji / R_ii. That is what the published updates move the weight to.
    """
    order, root = factor
    exact = grid.weight[:, start:stop].T[order].to(root.dtype)  # columns first: each is contiguous
    lost, diagonal, columns = torch.empty_like(exact), root.diagonal()[:, None], (order + start).tolist()
    errors = torch.zeros(exact.shape[1], dtype=torch.float64, device=exact.device)
    for first in range(0, len(columns), BLOCK):
        block = slice(first, min(first + BLOCK, len(columns)))
        wanted = exact[block] + (root[:first, block].T @ lost[:first]) / diagonal[block]
        values = round_in_turn(grid, columns[block], wanted, root[block, block] / diagonal[block].T, exact[block])
        errors += ((wanted - values) * diagonal[block]).square().sum(0, dtype=torch.float64)
        torch.sub(exact[block], values, out=lost[block])
        exact[block] = values
    unsorted = torch.empty_like(exact, dtype=torch.float32)
    unsorted[order] = exact.float()
    return unsorted.T, errors


def round_in_turn(grid: Grid, columns: Sequence[int], wanted: Tensor, coupling: Tensor, before: Tensor) -> Tensor:
    """Values of the grid for the numbered `columns` one after another, (columns, rows) in the dtype of `wanted`.

    Each takes the value nearest to what it wants, and moves what column j after it wants by (before - value) times
    `coupling` (columns, columns) at [it, j]. `wanted` and `before` are (columns, rows); the first ends as what each
    column wanted in its turn.
    """
    if wanted.device.type == "cpu":
        done = importlib.import_module(FASTER).round_in_turn(grid, columns, wanted, coupling, before)
        if done is not None:
            return done
    values = torch.empty_like(wanted)
    for index, column in enumerate(columns):
        values[index] = grid.round_column(wanted[index].float(), column)
        wanted[index + 1 :].addr_(coupling[index, index + 1 :], before[index] - values[index])
    return values


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


def wanted(grid: Grid, moments: Sequence[Tensor], options: Options, values: Tensor) -> Tensor:
    """The best of each weight with all others as `values` (rows, columns) has them, of the same shape, float32.

    q_j + (H (w - q))_j / H_jj: arXiv 2309.01885, eq. 4. Coordinate descent ends where `values` are the nearest to it.
    """
    best, first = values.clone(), 0
    for block in moments:
        part = slice(first, first + len(block))
        lost, damping = (grid.weight[:, part] - values[:, part]).to(block.dtype), _damping(block, options)
        best[:, part] += ((lost @ block + damping * lost) / (block.diagonal() + damping)).float()
        first = part.stop
    return best


def _descend(grid: Grid, moments: Tensor, damping: Tensor, sweeps: int, values: Tensor, start: int) -> None:
    """Change the `values` (rows, columns) of one block of columns, from column `start` of the grid, in place."""
    now = values.T.to(moments.dtype).contiguous()  # columns first: each is contiguous
    lost = grid.weight[:, start : start + len(now)].T.to(moments.dtype) - now
    costs = (moments.diagonal() + damping)[:, None]
    for _ in range(sweeps):
        changed = False
        for first in range(0, len(now), BLOCK):
            block = slice(first, min(first + BLOCK, len(now)))
            slope = torch.addmm(damping * lost[block], moments[block], lost)
            columns = range(start + block.start, start + block.stop)
            coupling = moments[block, block] / costs[block].T
            best = round_in_turn(grid, columns, now[block] + slope / costs[block], coupling, now[block])
            moved = best - now[block]
            changed |= bool(moved.any())
            lost[block] -= moved
            now[block] = best
        if not changed:
            break
    values.copy_(now.T)
