"""Equalize: move range between two layers with nothing but a linear function between them, so that their weights match.

Nagel et al., arXiv 1906.04721, eq. 11: s = sqrt(r1 r2) / r2 for each channel between the layers, with r1 the largest
magnitude of the first layer's row and r2 that of the second layer's column; rows and biases are divided by s and
columns multiplied by it.
"""

from collections.abc import Collection

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dmquant.transforms.base import InputStatistics, Transform
from dmquant.transforms.pair import Pair, pairs

_NO_RANGE = 1e-9


class Options(BaseModel):
    """What a recipe may set."""

    model_config = ConfigDict(extra="forbid")

    choose: bool = False
    """Whether calibration evens out those pairs alone whose second layers' outputs are nearer for it."""


class Equalize(Transform):
    """Nothing is stored: the float weights are others."""

    STAGE = 0
    WHOLE_MODEL = True

    @classmethod
    def takes_data(cls, options: Options) -> bool:
        return options.choose

    def optional(self) -> bool:
        return self.options.choose

    def folds(self) -> bool:
        return self.options.choose

    def factors(self, pair: Pair, statistics: InputStatistics | None) -> list[Tensor]:
        factor = equalizing(pair)
        return [torch.ones_like(factor), factor]

    @classmethod
    def prepare_(cls, module: nn.Module, layers: Collection[str]) -> None:
        """Equalize the pairs of `module` whose second layers are all among `layers`."""
        names = {layer: name for name, layer in module.named_modules()}
        for pair in pairs(module):
            if all(names[second] in layers for second in pair.seconds):
                equalize_(pair)


METHOD = Equalize


def equalize_(pair: Pair) -> None:
    """In float32 the ranges become equal; in 16 bits factors are powers of two, which round no weight."""
    pair.scale_(pair.allowed(equalizing(pair)))


@torch.no_grad()
def equalizing(pair: Pair) -> Tensor:
    """What the first layers are to be multiplied by, 1/s, float32 (channels,)."""
    first = torch.stack([_rows(layer)[: pair.channels] for layer in pair.firsts]).amax(0)
    second = torch.stack([layer.weight.abs().amax(0).float() for layer in pair.seconds]).amax(0)
    factor = second / (first * second).sqrt()
    return torch.where((first > _NO_RANGE) & (second > _NO_RANGE), factor, 1.0)


def _rows(layer: nn.Module) -> Tensor:
    """The largest magnitude of the weights that make each output channel; of a norm, its own factor."""
    weight = layer.weight.abs().float()
    return weight if weight.ndim == 1 else weight.amax(1)
