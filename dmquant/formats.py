"""Formats: finite sets of values of at most 8 bits, and the arithmetic between real numbers, values and codes.

A float format is closed form. Let 2^E be the binade of |x|, held inside the format's normal range; there the grid is
uniform with step 2^(E-m). Adding the anchor 1.5 * 2^23 * step to x leaves exactly the multiples of the step in a
float32 significand, so one addition in hardware rounding mode is "nearest, ties to even". Every other operation is
exact: CPU and CUDA, eager and compiled code (fused multiply-adds included) agree bit for bit.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmquant.errors import UsageError, unknown

_EXPONENT_FIELD = 0x7F800000  # of a float32
_EXPONENT_BIAS = 127
_FRACTION_BITS = 23
_BITS_OF_ONE = _EXPONENT_BIAS << _FRACTION_BITS


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
        anchor = self._anchor(self._binade(wide))
        return (wide + anchor).sub_(anchor).clamp_(-self.max, self.max).to(x.dtype)

    def step(self, x: Tensor) -> Tensor:
        return self._binade(x.detach().float()).mul_(2.0**-self.mantissa).to(x.dtype)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.detach().float().clamp(-self.max, self.max)
        step = self._binade(inside).mul_(2.0**-self.mantissa)
        # The exact reciprocal of a power of two; compilers for CUDA may approximate a division.
        inverse = (2 * _BITS_OF_ONE - step.view(torch.int32)).view(torch.float32)
        steps = inside * inverse
        return (steps.floor() * step).to(x.dtype), (steps.ceil() * step).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        wide = x.detach().float()
        binade = self._binade(wide)
        anchor = self._anchor(binade)
        steps = (wide.abs().clamp_(max=self.max) + anchor).view(torch.int32) - anchor.view(torch.int32)
        lowest_binade = (self.min_exponent + _EXPONENT_BIAS) << _FRACTION_BITS
        code = ((binade.view(torch.int32) - lowest_binade) >> (_FRACTION_BITS - self.mantissa)) + steps
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

    def _anchor(self, binade: Tensor) -> Tensor:
        """The float32 whose unit in the last place is the step of `binade`, and whose parity is that of its codes."""
        anchor = binade * (1.5 * 2.0 ** (_FRACTION_BITS - self.mantissa))
        if self.mantissa:
            return anchor
        # Without a mantissa bit, codes count binades: every second binade starts at an odd code.
        odd = ((binade.view(torch.int32) >> _FRACTION_BITS) - (self.min_exponent + _EXPONENT_BIAS)) & 1
        return (anchor.view(torch.int32) + odd).view(torch.float32)


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


@dataclass(frozen=True)
class LookupFormat:
    """Any ascending `table` of 2 to 256 finite values; a code is a value's index.

    Values that a dtype cannot hold exactly are rounded to it. Raises ValueError if the table is not like that.
    """

    name: str
    table: tuple[float, ...]
    # The last number that rounds to each value but the highest: the midpoint, or just below it where a tie goes up.
    _last: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in pairwise(self.table))
        if not (ascending and 2 <= len(self.table) <= 256 and all(map(math.isfinite, self.table))):
            raise ValueError(f"the table of format '{self.name}' must hold 2 to 256 finite values in ascending order")
        midpoints = [(low + high) / 2 for low, high in pairwise(self.table)]
        last = (middle if code % 2 == 0 else math.nextafter(middle, -math.inf) for code, middle in enumerate(midpoints))
        object.__setattr__(self, "_last", tuple(last))

    @property
    def bits(self) -> int:
        return (len(self.table) - 1).bit_length()

    @property
    def max(self) -> float:
        return self.table[-1]

    @property
    def min_positive(self) -> float:
        return min(value for value in self.table if value > 0)

    @property
    def values(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device="cpu")

    def round(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x.dtype).masked_fill_(x.isnan(), math.nan)

    def step(self, x: Tensor) -> Tensor:
        values = torch.tensor(self.table, dtype=torch.float32, device=x.device)
        upper = torch.searchsorted(values, x.float().contiguous(), right=True).clamp_(1, len(self.table) - 1)
        return (values[upper] - values[upper - 1]).to(x.dtype)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tensor(self.table, dtype=torch.float32, device=x.device)
        wide = x.float().contiguous()
        lower = torch.searchsorted(values, wide, right=True).sub_(1).clamp_(min=0)
        upper = torch.searchsorted(values, wide, right=False).clamp_(max=len(self.table) - 1)
        nan = x.isnan()
        return tuple(values[index].to(x.dtype).masked_fill_(nan, math.nan) for index in (lower, upper))

    def encode(self, x: Tensor) -> Tensor:
        # In float64, where midpoints of float32 values are exact: a tie is a tie.
        boundaries = torch.tensor(self._last, dtype=torch.float64, device=x.device)
        return torch.bucketize(x.double().contiguous(), boundaries).masked_fill_(x.isnan(), 0).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        return values.to(dtype)[codes.to(torch.int64) & (2**self.bits - 1)]


# NormalFloat4: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E.
NF4 = LookupFormat(
    "lut4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

SHORT_NAMES = {"fp4": "fp4_e2m1", "fp6": "fp6_e2m3", "fp8": "fp8_e4m3"}

_FLOAT_NAMES = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e3m4")


def known_formats() -> list[str]:
    """Names worth listing; `get_format` also knows every other fpN_eXmY with N = 1 + X + Y <= 8."""
    return [*_FLOAT_NAMES, *(f"int{bits}" for bits in range(2, 9)), NF4.name]


def get_format(name: str) -> Format:
    """The format called `name`, in either case: "fp4", "fp6_e3m2", "int8", "lut4"; always the same object.

    Raises UsageError for a name that is unknown, or whose bits do not add up.
    """
    lower = name.lower()
    return _parse(SHORT_NAMES.get(lower, lower))


@cache
def _parse(name: str) -> Format:
    for pattern, make in _PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            return make(*map(int, match.groups()))
    raise unknown("format", name, [*SHORT_NAMES, *known_formats()], "`dmquant formats` lists them")


def _make_float(bits: int, exponent: int, mantissa: int) -> FloatFormat:
    if bits != 1 + exponent + mantissa:
        raise UsageError(
            f"format 'fp{bits}_e{exponent}m{mantissa}' does not add up: "
            f"1 sign + {exponent} exponent + {mantissa} mantissa bits are {1 + exponent + mantissa}, not {bits}"
        )
    return FloatFormat(exponent, mantissa)


_PATTERNS: dict[str, Callable[..., Format]] = {
    r"fp(\d+)_e(\d+)m(\d+)": _make_float,
    r"int(\d+)": IntFormat,
    NF4.name: lambda: NF4,
}
