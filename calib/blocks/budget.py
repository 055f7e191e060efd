"""The memory that learning takes."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from dmquant.calib.blocks.learn import DTYPES
from dmquant.calib.blocks.outputs import nbytes
from dmquant.calib.blocks.units import Block, tasks_of
from dmquant.errors import UsageError
from dmquant.host.units import size_text
from dmquant.recipe import Learning

LEARNED, FITTED = 80, 24
"""Bytes a weight: while its rounding is learned (grid, bounds, V with gradient and moments, the graph), and where it is
fitted or solved alone. These and WORKING are chosen by benchmarks/calibration_memory.py."""
WORKING = 48
"""Bytes an element of the largest input of a layer while it is quantized and multiplied."""
SOLVING = 7
"""Times the size of a block of moments that solving it takes beside them: three matrices in float64, one in float32."""
BACKWARD = 2  # activations that autograd keeps, and gradients of about the same size


class Held(NamedTuple):
    """Bytes of the second moments of one layer, and of the largest block of columns that is solved at once."""

    moments: int
    block: int


def check_budget(
    total: int,
    backbone: nn.Module,
    blocks: Sequence[Block],
    learning: Learning,
    learns: bool,
    moments: Mapping[str, Held] = MappingProxyType({}),
    where: str = "",
    tail: bool = False,
) -> int:
    """Bytes that deciding the largest unit takes; UsageError where that is more than `total`.

    `learns`: whether roundings are learned, with gradients. `moments`: bytes of the second moments of those layers that
    are solved by them, of which one at a time has to fit. `where`: the memory meant, in words, such as "GPU ". `tail`:
    whether gradients come back through the blocks behind the unit.
    """

    def needed(learning: Learning) -> tuple[int, str]:
        """Of the unit that takes most, with its name."""
        units = range(len(blocks))
        return max((_needed(backbone, blocks, at, learning, learns, moments, tail), blocks[at].name) for at in units)

    taken, largest = needed(learning)
    if taken > total:
        least = size_text(taken, round_up=True)
        raise UsageError(
            f"a budget of {size_text(total)} of {where}memory is too small: {largest} alone takes {least}; "
            f"use --memory-budget {least.replace(' ', '')} or more{_what_fits(learning, total, needed)}"
        )
    return taken


def _what_fits(learning: Learning, total: int, needed: Callable[[Learning], tuple[int, str]]) -> str:
    """Settings with which `total` bytes are enough, each alone: the end of a line."""

    def taken(**changes: Any) -> int:
        return needed(learning.model_copy(update=changes))[0]

    sizes = bisect.bisect_right(range(1, learning.batch_size), total, key=lambda size: taken(batch_size=size))
    fits = [f"learning.batch_size: {sizes}"] if sizes else []
    smaller = {"window": ("block", "layer"), "block": ("layer",)}.get(learning.unit, ())
    fits += [f"learning.unit: {unit}" for unit in smaller if taken(unit=unit) <= total][:1]
    if not fits:
        return f"; no smaller learning.batch_size{' or learning.unit' if smaller else ''} is enough"
    return f", or {' or '.join(fits)}"


def bytes_a_weight(learns: bool) -> int:
    """Bytes held for each weight while its unit is decided."""
    return LEARNED if learns else FITTED


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
    backbone: nn.Module,
    blocks: Sequence[Block],
    number: int,
    learning: Learning,
    learns: bool,
    moments: Mapping[str, Held],
    tail: bool,
) -> int:
    own = next(backbone.parameters()).dtype.itemsize  # the dtype of the traced activations
    kept = BACKWARD * max(1, DTYPES[learning.dtype].itemsize / own) if learns else 0
    by_name = {block.name: block for block in blocks}
    most = 0
    for task in tasks_of(blocks, number, learning):
        weights = sum(backbone.get_submodule(name).weight.numel() for name in task.layers)
        members = [by_name[name] for name in task.blocks]
        activations = sum(int(block.saved_bytes * kept) + 2 * nbytes(block.output) for block in members)
        if tail:  # in the backbone's own dtype
            behind = blocks[number + len(members) :]
            activations += BACKWARD * sum(block.saved_bytes for block in behind)
        activations += WORKING * max(block.largest_input for block in members)
        solving = max((_solving([moments[name]]) for name in task.layers if name in moments), default=0)
        most = max(most, bytes_a_weight(learns) * weights + activations * learning.batch_size + solving)
    return most
