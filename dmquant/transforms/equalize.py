"""Equalize: move range between two layers with nothing but a linear function between them, so that their weights match.

Nagel et al., arXiv 1906.04721, eq. 11: s = sqrt(r1 r2) / r2 for each channel between the layers, with r1 the largest
magnitude of the first layer's row and r2 of the second layer's column; rows and biases are divided by s and
columns multiplied by it.
"""

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dmquant.transforms.interfaces import Fit, Folding, InputStatistics, Method, Storage
from dmquant.transforms.pair import Pair

_NO_RANGE = 1e-9


class Options(BaseModel, extra="forbid"):
    """Options of equalization in a recipe."""

    choose: bool = False
    """Whether calibration evens out those pairs alone whose second layers' outputs are nearer for it."""


class Equalize(Storage):
    """Nothing is stored: the float weights are others."""

    name = "equalize"
    STAGE = 0


@torch.no_grad()
def equalizing(pair: Pair) -> Tensor:
    """1 / s, eq. 11, by which the first layers are multiplied: float32 (channels,); 1 for a channel without range."""
    first = torch.stack([_rows(layer)[: pair.channels] for layer in pair.firsts]).amax(0)
    second = torch.stack([layer.weight.abs().amax(0).float() for layer in pair.seconds]).amax(0)
    factor = second / (first * second).sqrt()
    return torch.where((first > _NO_RANGE) & (second > _NO_RANGE), factor, 1.0)


def _rows(layer: nn.Module) -> Tensor:
    """The largest magnitude of the weights that make each output channel; of a norm, its own factor."""
    weight = layer.weight.abs().float()
    return weight if weight.ndim == 1 else weight.amax(1)


def _folding(options: Options) -> Folding:
    def factors(pair: Pair, statistics: InputStatistics | None) -> list[Tensor]:
        factor = equalizing(pair)
        return [torch.ones_like(factor), factor] if options.choose else [factor]

    return Folding(factors, chosen=options.choose)


METHOD = Method(Options, Equalize, lambda options: Fit(int(options.choose), optional=options.choose), folding=_folding)
