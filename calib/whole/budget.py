"""The memory that learning all layers at once takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dmquant.calib.blocks.budget import BACKWARD, WORKING
from dmquant.calib.blocks.learn import DTYPES
from dmquant.calib.blocks.outputs import nbytes
from dmquant.calib.blocks.units import Block
from dmquant.errors import UsageError
from dmquant.host.units import size_text
from dmquant.recipe import Learning

HELD, GRAPH = 56, 24
"""Bytes a weight: held while its rounding is learned (the float weight, what it was solved to and wanted to be, the two
values that it is between, what is learned with its gradient and two moments, and the best roundings so far), and in the
graph of a pass forward and back."""


@dataclass(frozen=True)
class Needed:
    """Bytes that learning all layers at once takes; predictions of the teacher come on top, or are spilled."""

    weights: int
    """Held for weights."""
    graph: int
    """Of a pass forward and back over a mini-batch where every block keeps its activations."""
    recomputed: int
    """Of one where only the blocks' inputs are kept, and the rest is computed again."""

    def recomputes(self, total: int) -> bool:
        """Whether blocks have to compute their activations again, so that `total` bytes are enough."""
        return self.weights + self.graph > total

    def check(self, total: int, batch_size: int, where: str = "") -> int:
        """The bytes that it will take; UsageError, saying what would fit, where that is more than `total`."""
        taken = self.weights + (self.recomputed if self.recomputes(total) else self.graph)
        if taken <= total:
            return taken
        a_sample = self.recomputed // batch_size
        fits = (total - self.weights) // max(a_sample, 1)
        instead = f"or learning.batch_size: {fits}" if fits >= 1 else "or learning.unit: block"
        least = size_text(taken, round_up=True).replace(" ", "")
        raise UsageError(
            f"a budget of {size_text(total)} of {where}memory is too small to learn all layers at once, which takes "
            f"{size_text(self.weights)} for the weights and {size_text(a_sample)} for each of {batch_size} samples of "
            f"a mini-batch: use --memory-budget {least} or more, {instead}"
        )


def needed(backbone: nn.Module, blocks: Sequence[Block], learning: Learning) -> Needed:
    """What learning all layers of these blocks takes, by their traces."""
    own = next(backbone.parameters()).dtype.itemsize  # the dtype of the traced activations
    kept = BACKWARD * max(1, DTYPES[learning.dtype].itemsize / own)
    weights = [sum(backbone.get_submodule(name).weight.numel() for name in block.layers) for block in blocks]
    saved = [int(block.saved_bytes * kept) for block in blocks]
    working = WORKING * max(block.largest_input for block in blocks)
    inputs = sum(nbytes(block.output) for block in blocks)
    batch = learning.batch_size
    return Needed(
        HELD * sum(weights),
        GRAPH * sum(weights) + batch * (sum(saved) + working),
        GRAPH * max(weights) + batch * (inputs + max(saved) + working),
    )
