"""Float formats, in closed form.

Let 2^E be the binade of |x|, held inside the format's normal range; there the grid is uniform with step 2^(E-m).
Adding the anchor 1.5 * 2^23 * step to x leaves exactly the multiples of the step in a float32 significand, so one
addition in hardware rounding mode is "nearest, ties to even". Every other operation is exact: CPU and CUDA, eager and
compiled code (fused multiply-adds included) agree bit for bit.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmquant.errors import UsageError

_EXPONENT_FIELD = 0x7F800000  # of a float32
_EXPONENT_BIAS = 127
_FRACTION_BITS = 23
_BITS_OF_ONE = _EXPONENT_BIAS << _FRACTION_BITS


class _Specials(NamedTuple):
    """Codes, sign bit aside, that are no finite values: every code from `first` up."""

    first: int
    infinity: int | None
    nan: int


# OCP 8-bit floating point specification 1.0, table 1. No other format here gives up codes for infinity or NaN.
_SPECIALS = {
    (4, 3): _Specials(first=0x7F, infinity=None, nan=0x7F),
    (5, 2): _Specials(first=0x7C, infinity=0x7C, nan=0x7E),
}


@dataclass(frozen=True)
class FloatFormat:
    """A signed minifloat with `exponent` and `mantissa` bits (OCP MX specification 1.0, section 5.3).

    The bias is 2^(exponent-1) - 1 and there are subnormals; only fp8_e4m3 and fp8_e5m2 have infinity or NaN codes.
    A code is sign, exponent, mantissa from the top bit down. With one exponent bit the grid is uniform. Formats of
    more than five exponent bits, fp6_e5m0 and fp7_e5m1 hold values that float16 cannot: use the other dtypes there.
    Raises UsageError if there is no exponent bit or the format has more than 8 bits.
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if self.exponent < 1:
            raise UsageError(f"format '{self.name}' needs an exponent bit; the uniform grids are 'int2' to 'int8'")
        if self.bits > 8:
            raise UsageError(f"format '{self.name}' has {self.bits} bits; formats have at most 8")

    @property
    def name(self) -> str:
        return f"fp{self.bits}_e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value."""
        return self.min_exponent - 1 + (self.max_code >> self.mantissa)

    @property
    def max_code(self) -> int:
        """Code of the largest value."""
        return self._specials.first - 1 if self._specials else 2 ** (self.bits - 1) - 1

    @property
    def max(self) -> float:
        fraction = (self.max_code % 2**self.mantissa) / 2**self.mantissa
        return 2.0**self.max_exponent * (1 + fraction)

    @property
    def min_positive(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa)

    @property
    def values(self) -> Tensor:
        positive = self.decode(torch.arange(1, self.max_code + 1, device="cpu"))
        return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])

    def round(self, x: Tensor) -> Tensor:
        wide = x.detach().float()
        anchor = self._anchor_(self._binade(wide))
        return (wide + anchor).sub_(anchor).clamp_(-self.max, self.max).to(x.dtype)

    def step(self, x: Tensor) -> Tensor:
        return self._binade(x.detach().float()).mul_(2.0**-self.mantissa).to(x.dtype)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.detach().float().clamp(-self.max, self.max)
        step = self._binade(inside).mul_(2.0**-self.mantissa)
        # The exact reciprocal of a power of two (CUDA may approximate a division), times which subnormals would vanish.
        inverse = (2 * _BITS_OF_ONE - step.view(torch.int32)).view(torch.float32)
        steps = torch.where(inside == 0, inside, inside.abs().clamp(min=2.0**-126).copysign(inside)) * inverse
        return (steps.floor() * step).to(x.dtype), (steps.ceil() * step).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        wide = x.detach().float()
        binade = self._binade(wide)
        lowest_binade = (self.min_exponent + _EXPONENT_BIAS) << _FRACTION_BITS
        first = (binade.view(torch.int32) - lowest_binade) >> (_FRACTION_BITS - self.mantissa)
        anchor = self._anchor_(binade)
        code = first.add_((wide.abs().clamp_(max=self.max) + anchor).view(torch.int32)).sub_(anchor.view(torch.int32))
        sign = ((wide.view(torch.int32) >> 31) & 1) << (self.bits - 1)
        nan = self._specials.nan if self._specials else 0
        return (code | sign).masked_fill_(wide.isnan(), nan).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = codes.to(torch.int32)
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        exponent_offset = (self.min_exponent - 1 + _EXPONENT_BIAS) << _FRACTION_BITS
        normal = ((magnitude << (_FRACTION_BITS - self.mantissa)) + exponent_offset).view(torch.float32)
        # A subnormal code read as a normal one is (value + 2^min_exponent) / 2; of the two lines, take the lower.
        value = torch.minimum(normal, 2 * normal - 2.0**self.min_exponent)
        if self._specials:
            value = value.masked_fill(magnitude >= self._specials.first, math.nan)
            if self._specials.infinity is not None:
                value = value.masked_fill(magnitude == self._specials.infinity, math.inf)
        sign = (codes >> (self.bits - 1)) << 31
        return (value.view(torch.int32) | sign).view(torch.float32).to(dtype)

    @property
    def _specials(self) -> _Specials | None:
        return _SPECIALS.get((self.exponent, self.mantissa))

    def _binade(self, x: Tensor) -> Tensor:
        """2^floor(log2 |x|) of a float32 tensor, held between the format's lowest and highest binade."""
        power = (x.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
        return power.clamp_(2.0**self.min_exponent, 2.0**self.max_exponent)

    def _anchor_(self, binade: Tensor) -> Tensor:
        """The float32 whose unit in the last place is the step of `binade`, with the parity of the binade's codes.

        Made in the place of `binade` where there is a mantissa bit.
        """
        factor = 1.5 * 2.0 ** (_FRACTION_BITS - self.mantissa)
        if self.mantissa:
            return binade.mul_(factor)
        anchor = binade * factor
        # Without a mantissa bit, codes count binades: every second binade starts at an odd code.
        odd = ((binade.view(torch.int32) >> _FRACTION_BITS) - (self.min_exponent + _EXPONENT_BIAS)) & 1
        return (anchor.view(torch.int32) + odd).view(torch.float32)
