"""Roundings that are learned straight through: what each weight is rounded from is learned, and the scales with it.

The gradient passes a rounding as if it were not there, and stops where the grid ends (Bengio et al., arXiv 1308.3432).
"""

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.formats import Format
from dmquant.grids import Grid, ScaledGrid, TableGrid
from dmquant.grids.base import Spec
from dmquant.rounding.base import Rounding
from dmquant.scaling import Scales, from_groups, to_groups
from dmquant.stores import get_store

FASTER = "dmquant.cpu.solving"  # one pass forward and one back on a CPU; by name alone, since it stands above
FROM_SOLUTION = 0.1  # of a method's rate: what is balanced already is lost in larger steps
NEAR = 0.1  # a store that tries a multiple of absmax so near to 1 has scales near to one another


class Straight(Rounding):
    """W~ = Q(x), with `x` (rows, columns) by the method, on scales that are multiplied by exp(shift).

    At the start x is the weight, or with a solution `source`, and W~ the nearest values, or the solution.
    """

    def __init__(self, grid: Grid, learn_scales: bool):
        super().__init__(grid)
        self.register_buffer("source", _source(grid))
        moves = learn_scales and can_move(grid.spec)
        self.shift = nn.Parameter(torch.zeros_like(grid.scale)) if moves else None
        if grid.solution is not None:
            self.learning_rate = FROM_SOLUTION * self.learning_rate

    def rounded_from(self) -> Tensor:
        """What the weights are rounded from, (rows, columns) float32, differentiable."""
        raise NotImplementedError

    @torch.compiler.disable
    def forward(self) -> Tensor:
        return _StraightThrough.apply(self.rounded_from(), self.shift, self.decided_grid())

    def hard(self) -> Tensor:
        return self.forward().detach()

    def decided_grid(self) -> Grid:
        if self.shift is None:
            return self.grid
        scales = moved(self.grid.scales, self.grid.spec.fmt, self.shift.detach().exp())
        return replace(_at(self.grid, self.grid.weight), scales=scales)


def _source(grid: Grid) -> Tensor:
    """What nearest rounding gives the solution of: what it wanted, or where that is nearer to another value, itself."""
    if grid.solution is None:
        return grid.weight
    return torch.where(_at(grid, grid.wanted).nearest == grid.solution, grid.wanted, grid.solution)


def _at(grid: Grid, weight: Tensor) -> Grid:
    return replace(grid, weight=weight, solution=None, wanted=None)


def can_move(spec: Spec) -> bool:
    """Whether scales of weights of this specification can be moved a little: not tables, not scales that lie octaves
    apart, and not one of a whole weight that other layers share."""
    near = any(abs(multiple - 1) < NEAR for multiple in get_store(spec.store).search)
    return spec.grid_type is ScaledGrid and near and (spec.amplitude is None or spec.granularity.kind != "tensor")


def moved(scales: Scales, fmt: Format, multiple: Tensor) -> Scales:
    """Scales that are these multiples (rows, columns) of the old ones, as stored; where it is 1, the very same."""
    stored = get_store(scales.store).encode(scales.decode() * multiple * fmt.max, fmt, scales.base)
    return replace(scales, stored=torch.where(multiple == 1, scales.stored, stored))


def held(grid: Grid, x: Tensor) -> Tensor:
    """`x`, (rows, columns) float32, held between the least and the largest value that the grid has for each."""
    if isinstance(grid, TableGrid):
        ends = grid.tables[:, :1], grid.tables[:, -1:]
        return x.view(len(grid.tables), -1).clamp(*ends).view(x.shape)
    spec, scale = grid.spec, grid.scale.unsqueeze(-1)
    first, last = (scale * end for end in spec.fmt.values[[0, -1]].tolist())
    groups = to_groups(x, spec.granularity, grid.segments)
    groups = groups.clamp(torch.minimum(first, last), torch.maximum(first, last))  # a negative scale turns them around
    return from_groups(groups, spec.granularity, grid.segments)


class _StraightThrough(torch.autograd.Function):
    """Q(x), whose derivative by x is 1 within the grid and 0 beyond its ends.

    With the values s c(x / s), that by log s is s c - x within, and s c beyond.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, grid: Grid) -> Tensor:
        values = importlib.import_module(FASTER).round_straight(grid, x)
        values = _at(grid, x).nearest if values is None else values
        ctx.grid = grid
        ctx.save_for_backward(x, values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, values), grid, of_scales = ctx.saved_tensors, ctx.grid, None
        done = importlib.import_module(FASTER).straight_gradient(grid, x, values, gradient)
        if done is not None:
            return done[0], done[1] if ctx.needs_input_grad[1] else None, None
        inside = gradient * (held(grid, x) == x)
        if ctx.needs_input_grad[1]:
            by_weight = gradient * values - inside * x
            of_scales = to_groups(by_weight, grid.spec.granularity, grid.segments).sum(-1)
        return inside, of_scales, None
