"""LoRA-Rounding: AdaRound whose V may move by a matrix of low rank, so that few numbers are learned.

CBQ, arXiv 2312.07950, section 3.3: V = A1 A2. Such a V is 0.5 of every weight where it starts, and cannot take the
sides of arbitrary weights; here V = V0 + A1 A2, with V0 from where each weight lies and A2 = 0 at the start.
"""

import math

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dmquant.rounding.adaround import Gated

LEARNS = True
NEEDS_MOMENTS = False


class Options(BaseModel, extra="forbid"):
    """Options of LoRA-Rounding in a recipe."""

    rank: int = Field(default=5, ge=1)
    """Columns of A1 and rows of A2, at most as many as the weight's shorter side."""
    regularizer: float = Field(default=1.0, ge=0)
    """Weight of AdaRound's penalty. A matrix of low rank cannot decide every weight: from 100 on it takes their sides
    away from them, all together, and with none there is nothing to learn, since it starts at the float weights."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps without penalty."""
    beta: tuple[float, float] = (20.0, 2.0)
    """The penalty's exponent after the warm-up and at the end; linear in between."""


class LoRARounding(Gated):
    """V = V0 + A1 A2, with V0 as AdaRound begins."""

    def begin(self, v: Tensor) -> None:
        self.register_buffer("start", v)
        rank = min(self.options.rank, *v.shape)
        draw = torch.Generator().manual_seed(0)
        first = torch.randn(len(v), rank, generator=draw, dtype=torch.float32) / math.sqrt(rank)
        self.first, self.second = nn.Parameter(first.to(v.device)), nn.Parameter(v.new_zeros(rank, v.shape[1]))

    @property
    def v(self) -> Tensor:
        """V, (rows, columns) float32."""
        return torch.addmm(self.start, self.first, self.second)


start = LoRARounding
"""Soft weights equal to the float weights (clipped to the grid), or to what a solution wanted, to float32 precision."""
