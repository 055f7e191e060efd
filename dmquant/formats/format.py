"""What every format offers."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Format(Protocol):
    """A finite set of values, each with a code of `bits` bits.

    Every method takes tensors of any shape and device. `x` is float32, bfloat16 or float16 (float64 is first rounded
    to float32); results that are values have its dtype and shape, and codes are uint8. Results carry no gradient: the
    straight-through estimator is `x + (fmt.round(x) - x).detach()`.
    """

    @property
    def name(self) -> str:
        """The full name that `get_format` knows, such as "fp4_e2m1"."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def max(self) -> float:
        """The largest value: what `absmax` scales to."""
        ...

    @property
    def min_positive(self) -> float:
        """The smallest value above zero."""
        ...

    @property
    def values(self) -> Tensor:
        """All distinct finite values, ascending; float32 on the CPU."""
        ...

    def round(self, x: Tensor) -> Tensor:
        """The nearest value: ties to the even code, saturating (infinities too); NaN stays NaN."""
        ...

    def step(self, x: Tensor) -> Tensor:
        """Distance between the two values around `x`; where `x` saturates, the step at the end it saturates to."""
        ...

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adjacent values lo <= x <= hi; equal where `x` is a value or saturates, NaN where it is NaN."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest values. NaN gives the NaN code where the format has one, 0 otherwise."""
        ...

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of `codes`; bits above the format's own are ignored."""
        ...
