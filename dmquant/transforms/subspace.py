"""Subspace: what an input has in its few principal directions is multiplied in 16 bits, only the rest is quantized.

y = W^ Q(x - U^T U x) + V U x, with U the r principal directions of the layer's inputs and V = W U^T, both in 16 bits.
From DiRotQ (Sharify et al., arXiv 2605.16732), which rotates the input into the basis of all its directions and keeps
the first in high precision; here the others are not rotated, and the weights that multiply the first are not quantized.
"""

import math
from collections.abc import Iterator, Sequence
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
    """The first of all transforms: it is given the layer's own input. All positions of a kernel share the directions."""

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

    def up(self, parts: Parts) -> Tensor:
        """V as the weight of a layer whose input are the coordinates, (out, rank, ...)."""
        return parts["up"].view(self.shape[0], self.rank, *self.shape[2:])

    def undo(self, weight: Tensor, parts: Parts) -> Tensor:
        directions = parts["directions"].float()
        missing = self.up(parts).float() - _along(weight, directions, 1)
        return weight + _along(missing, directions.T, 1)

    def input(self, x: Tensor, parts: Parts, dim: int) -> Tensor:
        directions = parts["directions"].float()
        return x - _along(_along(x.float(), directions, dim), directions.T, dim).to(x.dtype)

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
        coordinates, up = _along(x, parts["directions"].to(x.dtype), layer.channel_dim), self.up(parts).to(x.dtype)
        if len(self.shape) == 2:
            return y + (coordinates @ up.T).to(y.dtype)
        convolved: Any = layer._conv_forward(coordinates, up, None)
        return y + convolved.to(y.dtype)

    def added_products(self) -> int:
        return self.rank * (2 * self.shape[1] + self.shape[0] * math.prod(self.shape[2:]))

    def __str__(self) -> str:
        return f"subspace:{self.rank}"


def _along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The matrix (n, channels) times the channels of `x` along `dim`; n channels in their place."""
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


class Principal(Fit):
    """The eigenvectors of the largest eigenvalues of the second moments of the inputs, each row over its own RMS."""

    def candidates(self, storage: Subspace, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        directions = weight.new_zeros(storage.rank, weight.shape[1])
        if statistics is not None:
            directions = principal(statistics.sample, storage.rank, 1 if weight.ndim > 2 else -1).to(weight.device)
        directions = directions.bfloat16()
        up = _along(weight, directions.float(), 1).flatten(1).bfloat16()
        return [{"directions": directions, "up": up}]


def principal(sample: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    """The first `rank` principal directions (rank, channels) float32 of inputs with their channels along `dim`."""

    def tokens() -> Iterator[Tensor]:
        for x in sample:
            for row in x.float():
                flat = row.movedim(dim - 1 if dim > 0 else -1, -1).reshape(-1, x.shape[dim])
                yield flat / flat.square().mean().sqrt().clamp(min=1e-30)

    moments = sum(flat.T @ flat for flat in tokens())
    return torch.linalg.eigh(moments).eigenvectors[:, -rank:].T.flip(0)


METHOD = Method(Options, Subspace, fit=lambda options: Principal(statistics=1))
