"""How much memory learning takes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from dmquant.calib.blocks.outputs import nbytes
from dmquant.calib.blocks.units import Block, tasks_of
from dmquant.errors import UsageError
from dmquant.host.units import size_text
from dmquant.recipe import Learning

STATE = 80
"""Bytes a weight while its rounding is learned, measured: grid, bounds, V with gradient and moments, the graph."""
SOLVING = 7
"""Times the size of a block of moments that solving it takes beside them: three matrices in float64, one in float32."""
BACKWARD = 2  # what autograd keeps, and gradients of about the same size


class Held(NamedTuple):
    """Bytes of the second moments of one layer, and of the largest block of columns that is solved at once."""

    moments: int
    block: int


def check_budget(
    total: int,
    backbone: nn.Module,
    blocks: Sequence[Block],
    learning: Learning,
    moments: Mapping[str, Held] = MappingProxyType({}),
) -> int:
    """Bytes that learning the largest unit takes; UsageError where that is more than `total`.

    `moments`: bytes of the second moments of those layers that are solved by them, of which one at a time has to fit.
    """
    needed = {block.name: _needed(backbone, blocks, number, learning, moments) for number, block in enumerate(blocks)}
    largest = max(needed, key=needed.get)
    if needed[largest] > total:
        least = size_text(needed[largest], round_up=True)
        raise UsageError(
            f"a memory budget of {size_text(total)} is too small: {largest} alone takes {least}; "
            f"use --memory-budget {least.replace(' ', '')} or more, or a smaller learning.batch_size"
        )
    return needed[largest]


def passes(moments: Mapping[str, Held], budget: int) -> list[list[str]]:
    """Layers in their order, as many together as the moments of all and solving one of them take of `budget` bytes."""
    together: list[list[str]] = [[]]
    for name in moments:
        held = [moments[each] for each in (*together[-1], name)]
        if together[-1] and _solving(held) > budget:
            together.append([])
        together[-1].append(name)
    return together


def _solving(held: Sequence[Held]) -> int:
    """Bytes of the moments of these layers and of solving one after another: its other blocks' factors stay."""
    solving = [each.moments - each.block + SOLVING * each.block for each in held]
    return sum(each.moments for each in held) + max(solving, default=0)


def _needed(
    backbone: nn.Module, blocks: Sequence[Block], number: int, learning: Learning, moments: Mapping[str, Held]
) -> int:
    by_name = {block.name: block for block in blocks}
    most = 0
    for task in tasks_of(blocks, number, learning):
        weights = sum(backbone.get_submodule(name).weight.numel() for name in task.layers)
        members = [by_name[name] for name in task.blocks]
        activations = sum(block.saved_bytes * BACKWARD + 2 * nbytes(block.output) for block in members)
        solving = max((_solving([moments[name]]) for name in task.layers if name in moments), default=0)
        most = max(most, STATE * weights + max(activations * learning.batch_size, solving))
    return most
