"""Equalize: move range between two layers with nothing but a linear function between them, so that their weights match.

Nagel et al., arXiv 1906.04721, eq. 11: s = sqrt(r1 r2) / r2 for each channel between the layers, with r1 the largest
magnitude of the first layer's row and r2 that of the second layer's column; rows and biases are divided by s and
columns multiplied by it.
"""

from collections.abc import Collection

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dmquant.transforms.base import Transform
from dmquant.transforms.pairs import Pair, pairs

_NO_RANGE = 1e-9


class Options(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(extra="forbid")


class Equalize(Transform):
    """Nothing is stored: the float weights are others."""

    STAGE = 0
    WHOLE_MODEL = True

    @classmethod
    def prepare_(cls, module: nn.Module, layers: Collection[str]) -> None:
        """Equalize the pairs of `module` whose second layers are all among `layers`."""
        names = {layer: name for name, layer in module.named_modules()}
        for pair in pairs(module):
            if all(names[second] in layers for second in pair.seconds):
                equalize_(pair)


METHOD = Equalize


@torch.no_grad()
def equalize_(pair: Pair) -> None:
    """In float32 the ranges become equal; in 16 bits factors are powers of two, which round no weight."""
    first = torch.stack([_rows(layer)[: pair.channels] for layer in pair.firsts]).amax(0)
    second = torch.stack([layer.weight.abs().amax(0).float() for layer in pair.seconds]).amax(0)
    factor = second / (first * second).sqrt()
    factor = torch.where((first > _NO_RANGE) & (second > _NO_RANGE), factor, 1.0)
    pair.scale_(pair.allowed(factor))


def _rows(layer: nn.Module) -> Tensor:
    """The largest magnitude of the weights that make each output channel; of a norm, its own factor."""
    weight = layer.weight.abs().float()
    return weight if weight.ndim == 1 else weight.amax(1)
