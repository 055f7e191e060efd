"""Subspace: what an input has in its few principal directions is multiplied in 16 bits, only the rest is quantized.

y = W^ Q(x - U^T U x) + V U x, with U the r principal directions of the layer's inputs and V = W U^T, both in 16 bits.
From DiRotQ (Sharify et al., arXiv 2605.16732), which rotates the input into the basis of all its directions and keeps
the first in high precision; here the others are not rotated, and the weights that multiply the first are not quantized.
"""

import math
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dmquant.transforms.interfaces import Fit, InputStatistics, Method, Part, Parts, Storage


class Options(BaseModel, extra="forbid"):
    """Options of the subspace in a recipe."""

    rank: int = Field(default=32, ge=1)
    """Directions that are kept, at most half of the input's channels."""


class Subspace(Storage):
    """The first of all transforms: given the layer's own input. The positions of a kernel share the directions."""

    name = "subspace"
    STAGE = 5
    CHANGES_INPUT = True
    GROUPED = False

    @property
    def rank(self) -> int:
        return min(self.options.rank, max(1, self.shape[1] // 2))

    def parts(self) -> dict[str, Part]:
        up = self.shape[0], self.rank * math.prod(self.shape[2:])
        return {"directions": Part((self.rank, self.shape[1]), torch.bfloat16), "up": Part(up, torch.bfloat16)}

    def undo(self, weight: Tensor, parts: Parts) -> Tensor:
        directions, up = parts["directions"].float(), self._up(parts).float()
        return weight + _times(directions.T, up - _times(directions, weight, 1), 1)

    def input(self, x: Tensor, parts: Parts, dim: int) -> Tensor:
        directions, exact = parts["directions"].float(), x.float()
        return (exact - _times(directions.T, _times(directions, exact, dim), dim)).to(x.dtype)

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
        kept, up = _times(parts["directions"].to(x.dtype), x, layer.channel_dim), self._up(parts).to(x.dtype)
        convolve: Any = layer._conv_forward if up.ndim > 2 else torch.nn.functional.linear
        return y + convolve(kept, up, None).to(y.dtype)

    def _up(self, parts: Parts) -> Tensor:
        """V as the weight of a layer, (out, rank, ...)."""
        return parts["up"].view(self.shape[0], self.rank, *self.shape[2:])

    def added_products(self) -> int:
        return self.rank * (2 * self.shape[1] + self.shape[0] * math.prod(self.shape[2:]))

    def __str__(self) -> str:
        return f"subspace:{self.rank}"


def _times(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """The matrix (n, channels) times the channels of `x`, which are along `dim`; n channels in their place."""
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


class Principal(Fit):
    """The eigenvectors of the largest eigenvalues of the inputs' second moments, each row of a batch over its RMS."""

    def candidates(self, storage: Subspace, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        moments = weight.new_zeros(weight.shape[1], weight.shape[1])
        for row in [row.float() for x in statistics.sample for row in x] if statistics else []:
            tokens = (row.flatten(1).T if weight.ndim > 2 else row.view(-1, row.shape[-1])).to(weight.device)
            moments.addmm_(tokens.T, tokens, alpha=1 / float(tokens.square().mean().clamp(min=1e-30)))
        directions = torch.linalg.eigh(moments).eigenvectors[:, -storage.rank :].T.bfloat16()
        return [{"directions": directions, "up": _times(directions.float(), weight, 1).flatten(1).bfloat16()}]


METHOD = Method(Options, Subspace, fit=lambda options: Principal(statistics=1))
