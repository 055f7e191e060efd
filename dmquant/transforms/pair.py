"""Two layers with nothing but a linear function between them: range can move from one to the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """Layers `firsts` whose first `channels` output channels only the layers `seconds` read."""

    firsts: tuple[nn.Module, ...]
    seconds: tuple[nn.Linear, ...]
    channels: int

    def allowed(self, factor: Tensor) -> Tensor:
        """`factor` (channels,), same dtype; for weights in 16 bits its nearest powers of two, which round none."""
        wide = self.seconds[0].weight.dtype.itemsize >= 4
        return factor if wide else factor.float().log2().round().exp2().to(factor.dtype)

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply each of the channels by a factor in the firsts and divide it out of the seconds' weights, in place.

        `factor` is float32 (channels,). The function stays: to rounding, or with powers of two to the bit.
        """
        for layer in self.firsts:
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    part = parameter[: self.channels]
                    part.mul_(factor.view(-1, *[1] * (part.ndim - 1)).to(part.dtype))
        for layer in self.seconds:
            layer.weight.div_(factor.to(layer.weight.dtype))


Finder = Callable[[nn.Module], Iterator[Pair]]
_finders: list[Finder] = []


def finds_pairs(finder: Finder) -> Finder:
    """Decorate a function that yields the pairs of one block by the block's structure, none for another block."""
    _finders.append(finder)
    return finder


def pairs(module: nn.Module) -> Iterator[Pair]:
    """The pairs of a module by every finder in the order of their registration, of layers and weights in one place."""
    met = [id(weight) for _, weight in module.named_parameters(remove_duplicate=False)]
    found = (pair for finder in _finders for block in module.modules() for pair in finder(block) if _fits(pair))
    yield from (one for one in found if all(met.count(id(layer.weight)) == 1 for layer in one.firsts + one.seconds))


def _fits(pair: Pair) -> bool:
    """Whether all layers are plain and of fitting size."""
    firsts = all(type(one) in (nn.Linear, nn.LayerNorm) and len(one.weight) >= pair.channels for one in pair.firsts)
    return firsts and all(type(one) is nn.Linear and one.in_features == pair.channels for one in pair.seconds)
