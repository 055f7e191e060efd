"""The squared error of the unit's output, each element by how far the network's prediction depends on it.

BRECQ, Li et al., arXiv 2102.05426, section 3.2: the diagonal of the Fisher information of the output. Theirs is the
squared gradient of the loss at one error. A prediction with noise of variance 1 around it has the information J^T J, J
being its derivative by the output, and (J^T n)^2 with n standard normal noise is the diagonal of that on average.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dmquant.calib.data.tree import flatten
from dmquant.calib.objectives.base import TAIL, Objective, UnitData


class Options(BaseModel, extra="forbid"):
    """Options of the Fisher-weighted error in a recipe."""

    per: Literal["channel", "element"] = "channel"
    """What has a weight of its own, the mean over samples: a channel, or each element of the output of a row."""
    samples: int = Field(default=64, ge=1)
    """Samples that weights are measured on, one after another, spread over the schedule; each counts alike."""


def needs(options: Options) -> frozenset[str]:
    """What it needs beside the unit's outputs."""
    return frozenset({TAIL})


class Fisher(Objective):
    """The mean of squared errors times `weights`, one for each floating-point tensor of the output; 1 on average."""

    def __init__(self, data: UnitData, options: Options):
        super().__init__(data)
        some, generator = data.learning[:: -(-len(data.learning) // options.samples)], torch.Generator().manual_seed(0)
        sums: list[Tensor] = []
        for sample in some:
            squares = [_of(one, options.per) for one in self._gradients(sample, generator)]
            mean = torch.stack([square.mean() for square in squares]).mean().clamp(min=torch.finfo().tiny)
            sums = [square / mean + (sums[place] if sums else 0) for place, square in enumerate(squares)]
        self.weights = [one / len(some) for one in sums]

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        pairs = zip(_floats(self.data.run(batch, generator)), _floats(self.data.target(batch)), strict=True)
        errors = [(one.float() - other.float()).square() for one, other in pairs]
        return torch.stack([(one * weight).mean() for one, weight in zip(errors, self.weights, strict=True)]).mean()

    def _gradients(self, sample: int, generator: torch.Generator) -> list[Tensor]:
        """J^T n for one sample, by tensor of the output."""
        with torch.enable_grad(), self.data.graph():
            output, prediction = self.data.predict([sample], None)
            noise = torch.randn(prediction.shape, generator=generator, dtype=torch.float32).to(prediction)
            leaves = _floats(output)
            found = torch.autograd.grad(prediction, leaves, noise, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return [torch.zeros_like(leaf) if one is None else one.float() for one, leaf in pairs]


def _floats(output: object) -> list[Tensor]:
    return [leaf for _, leaf in flatten(output)[1] if leaf.is_floating_point()]


def _of(gradient: Tensor, per: str) -> Tensor:
    """Mean squares that broadcast to an output's rows: of elements, or of channels (last, or dimension 1 of images)."""
    squares = gradient.square().mean(0, keepdim=True)
    if per == "element" or squares.ndim < 3:
        return squares
    positions = (2, 3) if squares.ndim == 4 else tuple(range(1, squares.ndim - 1))
    return squares.mean(positions, keepdim=True)


start = Fisher
"""The objective of one unit."""
