"""The interface of every format."""

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

    name: str
    """The full name that `get_format` knows, such as "fp4_e2m1"."""
    bits: int
    """Bits of a code."""
    max: float
    """The largest value: what `absmax` scales to."""
    min_positive: float
    """The smallest value above zero."""
    values: Tensor
    """All distinct finite values, ascending; float32 on the CPU."""

    def round(self, x: Tensor) -> Tensor:
        """The nearest values, same shape: ties to the even code, saturating (infinities too); NaN stays NaN."""

    def step(self, x: Tensor) -> Tensor:
        """Distance of the two values around each `x`, same shape; where it saturates, the step at that end."""

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adjacent values lo <= x <= hi, same shape; equal where `x` is a value or saturates, NaN where it is NaN."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest values, uint8, same shape. NaN gives the format's NaN code, 0 where it has none."""

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of uint8 `codes`, same shape, in `dtype`; bits above the format's own are ignored."""
