"""The order of calibration: the blocks of a backbone, and the tasks that decide the codes of each."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dmquant.calib.blocks.trace import Traced
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
    """The blocks that hold these layers."""


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
    with the layers of the blocks that follow, as far as the window reaches, against the output of the last block; the
    codes of those blocks are decided anew in their turn.
    """
    block = blocks[number]
    if learning.unit == "layer":
        return [Task(layer, (layer,), (block.name,)) for layer in block.layers]
    window = [block]
    if learning.unit == "window" and not block.is_layer:
        for follower in blocks[number + 1 : number + learning.window]:
            if follower.is_layer:
                break
            window.append(follower)
    layers = tuple(layer for member in window for layer in member.layers)
    return [Task(window[-1].name, layers, tuple(member.name for member in window))]
