"""GPTQ: round column by column, each time moving the weights that are left so that they make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
section 3.3 and algorithm 1, on any grid whose scales are fitted before and stay as they are.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dmquant.errors import UserError
from dmquant.rounding.fixed import Fixed
from dmquant.rounding.grid import Grid

LEARNS = False
NEEDS_MOMENTS = True
BLOCK = 128  # columns between two updates of all that are left
TRIES = 8  # dampings to try, each ten times the one before


class Options(BaseModel):
    """What a recipe may set."""

    model_config = ConfigDict(extra="forbid")

    damping: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of the second moments, as a share of its mean."""
    order: Literal["activation", "given"] = "activation"
    """`activation`: columns of the largest inputs first. `given`: from the first column to the last."""


class Factor(NamedTuple):
    """The order of the columns, and the upper Cholesky factor U of the inverse moments in that order: U^T U = H^-1.

    U_ii^2 is the variance of column i given the columns after it: what an error there costs is its square over U_ii^2.
    """

    order: Tensor
    upper: Tensor


def start(grid: Grid, options: Options, moments: Tensor) -> Fixed:
    """The solution for inputs of these second `moments` (columns, columns), which are in the order of the grid."""
    return Fixed(solve(grid, factorize(moments, options))[0])


def factorize(moments: Tensor, options: Options) -> Factor:
    """The factor of damped moments, in their dtype, or in float64 where that is not precise enough.

    A column that no input reaches counts as independent of the others: it will be rounded to nearest. Raises UserError
    for moments that are not finite.
    """
    diagonal = moments.diagonal()
    if not torch.isfinite(diagonal).all():
        raise UserError("the inputs of a layer hold NaN or infinity: calibrate in --dtype fp32 or bf16")
    order = torch.arange(len(diagonal), device=moments.device)
    if options.order == "activation":
        order = diagonal.argsort(descending=True, stable=True)
    damping = options.damping * diagonal.mean().clamp(min=torch.finfo(moments.dtype).tiny)
    for attempt, dtype in enumerate((moments.dtype, *(torch.float64,) * TRIES)):
        damped = moments[order[:, None], order].to(dtype)
        if damped.data_ptr() == moments.data_ptr():
            damped = damped.clone()
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


def solve(grid: Grid, factor: Factor) -> tuple[Tensor, float]:
    """Values of the grid (rows, columns), and their error tr((W - Q) (H + damping) (W - Q)^T)."""
    order, upper = factor
    left = grid.weight.T[order].to(upper.dtype)  # columns first: each is contiguous
    values = torch.empty_like(left, dtype=torch.float32)
    errors, error = torch.empty_like(left[:BLOCK]), torch.zeros((), dtype=torch.float64, device=left.device)
    columns = order.tolist()
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
    return unsorted.T.contiguous(), error.item()
