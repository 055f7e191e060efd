"""Integer formats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmquant.errors import UsageError


@dataclass(frozen=True)
class IntFormat:
    """The two's complement integers of `bits` bits, -2^(bits-1) to 2^(bits-1) - 1.

    `max` is the positive end, so that a symmetric scale never needs the extra negative value.
    Raises UsageError unless `bits` is 2 to 8.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"format '{self.name}' does not exist; integer formats are 'int2' to 'int8'")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def min(self) -> float:
        """The smallest value."""
        return -(2.0 ** (self.bits - 1))

    @property
    def max(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    @property
    def min_positive(self) -> float:
        return 1.0

    @property
    def values(self) -> Tensor:
        return torch.arange(self.min, self.max + 1, dtype=torch.float32, device="cpu")

    def round(self, x: Tensor) -> Tensor:
        return x.detach().round().clamp_(self.min, self.max)

    def step(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.detach().clamp(self.min, self.max)
        return inside.floor(), inside.ceil()

    def encode(self, x: Tensor) -> Tensor:
        value = self.round(x).nan_to_num_(nan=0.0).to(torch.int32)
        return (value & (2**self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        unused = 32 - self.bits
        return ((codes.to(torch.int32) << unused) >> unused).to(dtype)
