"""Rotate: a Hadamard rotation of blocks of input channels, which spreads an outlier over all channels of its block.

y = (W R^T) (R x) with R = diag(H_n, H_n, ...) / sqrt(n), H_n of Sylvester (QuaRot, arXiv 2404.00456, online rotations).
Blocks keep the rotation inside the groups that share a scale.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from dmquant.errors import UsageError
from dmquant.transforms.interfaces import Fit, Method, Parts, Storage


class Options(BaseModel, extra="forbid"):
    """Options of the rotation in a recipe."""

    size: int = Field(default=64, ge=2)
    """Channels of a block, a power of two; where it does not divide a layer's channels, the largest that does."""
    order: Literal["sylvester", "regular"] = "sylvester"
    """The matrix: Sylvester's, or the products of one of 4 with equal sums of rows, which ComfyUI has (ConvRot)."""
    choose: bool = False
    """Whether calibration rotates those layers alone whose output is nearer for it."""

    @field_validator("size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise UsageError(f"a Hadamard block has a power of two channels, not {size}")
        return size


class Rotate(Storage):
    """Nothing is stored: the rotation is its own inverse, and computed where it is needed."""

    name = "rotate"
    STAGE = 15
    CHANGES_INPUT = True

    @property
    def size(self) -> int:
        """Channels of a block; it lies inside a half of a split input and inside a group of a convolution."""
        size = math.gcd(self.options.size, self.shape[1], self.split or 0)
        return size // 2 if self.options.order == "regular" and size.bit_length() % 2 == 0 else size

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        return self._turn(weight, 1)

    undo = to_quantize

    def input(self, x: Tensor, parts: Parts, dim: int) -> Tensor:
        return self._turn(x.float(), dim).to(x.dtype)

    def _turn(self, x: Tensor, dim: int) -> Tensor:
        return (regular_hadamard if self.options.order == "regular" else hadamard)(x, self.size, dim)

    def __str__(self) -> str:
        return f"rotate:{self.size}"


def hadamard(x: Tensor, size: int, dim: int) -> Tensor:
    """Every `size` consecutive elements along `dim` times the orthogonal Hadamard matrix H / sqrt(size) of Sylvester.

    `size` is a power of two that divides `x.shape[dim]`; same shape and dtype.
    """
    last = x.movedim(dim, -1)
    rotated, step = last, 1
    while step < size:
        upper, lower = rotated.unflatten(-1, (-1, 2, step)).unbind(-2)
        rotated = torch.stack((upper + lower, upper - lower), -2).flatten(-3)
        step *= 2
    return (rotated * size**-0.5).movedim(-1, dim)


def regular_hadamard(x: Tensor, size: int, dim: int) -> Tensor:
    """As `hadamard`, by the Kronecker powers of the matrix of 4 with 1 everywhere but -1 from corner to corner.

    `size` is a power of four (ConvRot, Huang et al., arXiv 2512.03673). A product as comfy-kitchen's, bit for bit.
    """
    of_four = 1 - 2 * torch.eye(4, device=x.device, dtype=torch.float32).flip(0)
    matrix = of_four.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, of_four)
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, size))
    return (blocks @ (matrix * size**-0.5).to(x.dtype)).flatten(-2).movedim(-1, dim)


METHOD = Method(Options, Rotate, fit=lambda options: Fit(statistics=int(options.choose), optional=options.choose))
