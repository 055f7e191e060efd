"""The order of calibration: the blocks of a backbone, and the tasks that decide the codes of each."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dmquant.calib.blocks.trace import Traced
from dmquant.errors import UsageError
from dmquant.recipe import Learning


@dataclass(frozen=True)
class Block:
    """A block, or a quantized layer outside of all blocks, which is a block of its own."""

    name: str
    layers: tuple[str, ...]
    """Names, in the backbone, of the layers to quantize."""
    is_layer: bool
    output: Any
    """The output for one sample."""
    last_use: int
    """Index of the last block that needs the output; the block's own index where none does."""
    saved_bytes: int
    """Activations that autograd keeps for one sample."""
    largest_input: int
    """Elements of the largest input of a layer for one sample."""
    overwrites: bool = False
    """Whether the block writes into what its layers have read, which autograd may keep."""
    is_overwritten: bool = False
    """Whether what runs between the blocks writes into the output."""


@dataclass(frozen=True)
class Task:
    """Layers whose codes are decided together, against full precision at the output of the module `output`."""

    output: str
    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    """The blocks that hold these layers, and those that are computed after them."""
    held: tuple[str, ...] = ()
    """Those of the layers whose roundings stay soft, and go on in the next task."""


def find_blocks(
    names: Sequence[str],
    layers: Collection[str],
    trace: Callable[[Sequence[str]], list[Traced]],
) -> list[Block]:
    """The blocks of these `names` and the `layers` outside of them, in the order they run.

    `trace` runs the backbone once and tells the order of the modules named; those that never run are left out, and so
    are blocks without layers to quantize.
    """
    owned: dict[str, tuple[str, ...]] = {}
    for name in names:
        inside = tuple(layer for layer in layers if layer.startswith(f"{name}."))
        if inside:
            owned[name] = inside
    inside_blocks = {layer for names in owned.values() for layer in names}
    stray = {layer: (layer,) for layer in layers if layer not in inside_blocks}
    return [
        Block(
            traced.name, (owned | stray)[traced.name], traced.name in stray,
            traced.output, traced.last_use, traced.saved_bytes, traced.largest_input,
            traced.overwrites, traced.is_overwritten,
        )
        for traced in trace([*owned, *stray])
    ]  # fmt: skip


def tasks_of(blocks: Sequence[Block], number: int, learning: Learning) -> list[Task]:
    """The tasks that decide the codes of block `number`.

    Unit `layer`: layers one after another, each against its own output. `block`: all layers at once. `window`: together
    with the layers of the blocks that follow, as far as the window reaches, against the output of its last block
    (`window_of`). An objective with `ahead` looks at the output of that many blocks further on.
    """
    block = blocks[number]
    window, decided = [block], [block]
    if learning.unit == "window" and not block.is_layer:
        window, decided = window_of(blocks, number, learning)
    ahead = [] if block.is_layer else _ahead(blocks, number + len(window), learning)
    names = tuple(member.name for member in [*window, *ahead])
    if learning.unit == "layer":
        return [Task(ahead[-1].name if ahead else layer, (layer,), names) for layer in block.layers]
    layers = tuple(layer for member in window for layer in member.layers)
    held = tuple(layer for member in window[len(decided) :] for layer in member.layers)
    return [Task(names[-1], layers, names, held)]


def window_of(blocks: Sequence[Block], number: int, learning: Learning) -> tuple[list[Block], list[Block]]:
    """The blocks of a window that are still to be decided from block `number` on, and those that it decides.

    CBQ, arXiv 2312.07950: windows begin every `learning.stride` blocks of a run of blocks without a layer between them;
    a block is decided in the last window that it is in.
    """
    first, end = number, number + 1
    while first and not blocks[first - 1].is_layer:
        first -= 1
    while end < len(blocks) and not blocks[end].is_layer:
        end += 1
    begin = number - (number - first) % learning.stride
    last = min(begin + learning.window, end)
    decided = end if last == end else begin + learning.stride
    return list(blocks[number:last]), list(blocks[number:decided])


def check_window(blocks: Sequence[Block], learning: Learning) -> None:
    """UsageError for a window of more blocks than there are."""
    count = sum(not block.is_layer for block in blocks)
    if learning.unit == "window" and learning.window > count:
        raise UsageError(f"learning.window: {learning.window} blocks are more than the {count} that this model has")


def _ahead(blocks: Sequence[Block], number: int, learning: Learning) -> list[Block]:
    """The blocks from `number` on through which the objective looks at a unit."""
    following = itertools.takewhile(lambda block: not block.is_layer, blocks[number:])
    return list(itertools.islice(following, getattr(learning.objective.checked, "ahead", 0)))
