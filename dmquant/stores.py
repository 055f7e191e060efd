"""Scale stores: how a scale is kept, and the float32 base that it may be relative to."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmquant.errors import UsageError
from dmquant.formats import Format, get_format

SMALLEST = 2.0**-126  # the smallest normal float32: below it a quotient could overflow
LARGEST = 3.38e38  # a little under the largest bfloat16: a scale rounded up must not overflow when multiplied
LARGEST_INTEGER = 64  # sums of two products with 8 bits stay below 2^15: some CPUs make them in 16 bits
MOST_FACTORS = 16
OCTAVES_BELOW = 14  # a `pow2` scale is at most so many octaves below its channel's scale
# Three times as many candidates lower the weight error by 1 % more at four bits and 8 % in FP8.
FINE_SEARCH = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5)
OCTAVE_SEARCH = (0.25, 0.5, 2.0)


@dataclass(frozen=True)
class Store:
    """A way to store scales: in `dtype`, and relative to a float32 base if `base_of` says so.

    Amplitudes, (..., rows, columns) float32, are the magnitudes that are to become the largest value of a format.
    """

    dtype: torch.dtype
    encode: Callable[[Tensor, Format, Tensor | None], Tensor]
    """Amplitudes, format and base to stored scales, of the amplitudes' shape."""
    decode: Callable[[Tensor, Tensor | None], Tensor]
    """Stored scales and base to float32 scales, of the stored ones' shape."""
    search: tuple[float, ...]
    """Multiples of absmax that the `mse` rule tries beside absmax itself."""
    signed: bool = False
    """Scales may be negative, which mirrors a format's values."""
    base_of: Literal["row", "tensor"] | None = None
    """The scales that share a base: a row of scales, or all of them."""
    fit_base: Callable[[Tensor, Format], Tensor] | None = None
    """Largest amplitudes, (..., 1, 1) or (..., rows, 1), and format to float32 bases of their shape."""
    factors: Callable[[Format], tuple[int, ...]] | None = None
    """Scales are these multiples of the base, ascending and stored as they are, and the base is searched too."""

    def tried(self, fmt: Format, *further: float) -> tuple[float, ...]:
        """Absmax and its multiples by `search` and `further`; of both signs where that differs for the format."""
        multiples, values = (1.0, *self.search, *further), fmt.values
        mirrored = self.signed and not torch.equal(values, -values.flip(0))
        return (*multiples, *(-each for each in multiples)) if mirrored else multiples

    def base(self, amplitude: Tensor, fmt: Format) -> Tensor | None:
        """The base for these amplitudes, (..., 1, 1) or (..., rows, 1) float32; None for a store without."""
        if self.base_of is None:
            return None
        largest = amplitude.amax(-1 if self.base_of == "row" else (-2, -1), keepdim=True)
        return self.fit_base(largest, fmt)

    def base_shape(self, scale_shape: tuple[int, int]) -> tuple[int, int] | None:
        """Shape of the base of scales (rows, columns); None for a store without."""
        return {None: None, "row": (scale_shape[0], 1), "tensor": (1, 1)}[self.base_of]


def floor_exponent(x: Tensor) -> Tensor:
    """floor(log2(x)) of positive normal float32 values, exactly; int32, same shape."""
    return (x.view(torch.int32) >> 23) - 127


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, same shape, for integer exponents of -126..127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _plain(amplitude: Tensor, fmt: Format, base: Tensor | None = None) -> Tensor:
    return (amplitude / fmt.max).clamp(SMALLEST, LARGEST / max(1.0, fmt.max))


def _half(amplitude: Tensor, fmt: Format, base: Tensor | None) -> Tensor:
    scale = amplitude / fmt.max
    return scale.abs().clamp(2.0**-24, torch.finfo(torch.float16).max).copysign(scale).half()


def _encode_e8m0(amplitude: Tensor, fmt: Format, base: Tensor | None) -> Tensor:
    """The exponent of the largest element less the format's largest exponent (OCP MX 1.0, section 6.3)."""
    largest = math.frexp(fmt.max)[1] - 1
    return (floor_exponent(amplitude) - largest + 127).clamp(1, 254).to(torch.uint8)


def _encode_pow2(amplitude: Tensor, fmt: Format, base: Tensor | None) -> Tensor:
    """The smallest power of two of the channel scale that clips nothing, at most OCTAVES_BELOW octaves below it."""
    ratio = (amplitude / fmt.max / base).clamp(min=2.0**-OCTAVES_BELOW)
    exponent = floor_exponent(ratio)
    exponent += ratio > power_of_two(exponent)
    return (exponent.clamp(-OCTAVES_BELOW, 127) + 127).to(torch.uint8)


def _minifloat(name: str, signed: bool = False) -> Store:
    """Multiples, of 8 bits in the float format of this name, of one base for the tensor."""
    small = get_format(name)

    def encode(amplitude: Tensor, fmt: Format, base: Tensor | None) -> Tensor:
        ratio = amplitude / fmt.max / base
        return small.encode(ratio.abs().clamp(min=small.min_positive).copysign(ratio))

    return Store(
        torch.uint8,
        encode,
        lambda stored, base: base * small.decode(stored),
        FINE_SEARCH,
        signed,
        base_of="tensor",
        fit_base=lambda largest, fmt: _plain(largest / small.max, fmt),
    )


def _whole(fmt: Format) -> tuple[int, ...]:
    """1, 2, 3, ... as long as the format's largest value times that is at most LARGEST_INTEGER of its smallest."""
    largest = int(fmt.values.nan_to_num().abs().amax() / fmt.min_positive)
    return tuple(range(1, max(1, min(LARGEST_INTEGER // largest, MOST_FACTORS)) + 1))


def _multiples(factors: Callable[[Format], tuple[int, ...]]) -> Store:
    """Whole multiples of a channel's base: a row of weights is integers of few bits times one float.

    Dai et al., "VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Neural Network Inference",
    arXiv 2102.04503: its scales in two levels, with few factors.
    """

    def encode(amplitude: Tensor, fmt: Format, base: Tensor | None) -> Tensor:
        known = amplitude.new_tensor(factors(fmt), dtype=torch.uint8)
        return known[torch.bucketize(amplitude / fmt.max / base, known[:-1].float())]  # the smallest that clips nothing

    def fit_base(largest: Tensor, fmt: Format) -> Tensor:  # up to 16 bits, so that its multiples are exact in float32
        return ((_plain(largest / factors(fmt)[-1], fmt).view(torch.int32) + 255) & ~255).view(torch.float32)

    return Store(
        torch.uint8,
        encode,
        lambda stored, base: base * stored.float(),
        search=(),
        base_of="row",
        fit_base=fit_base,
        factors=factors,
    )


def _as_float(stored: Tensor, base: Tensor | None) -> Tensor:
    return stored.float()


def _octaves(stored: Tensor, base: Tensor | None) -> Tensor:
    scale = power_of_two(stored.to(torch.int32) - 127)
    return scale if base is None else base * scale


STORES = {
    "fp32": Store(torch.float32, _plain, _as_float, FINE_SEARCH),
    "bf16": Store(torch.bfloat16, lambda *args: _plain(*args).bfloat16(), _as_float, FINE_SEARCH),
    "fp16": Store(torch.float16, _half, _as_float, FINE_SEARCH, signed=True),
    "e8m0": Store(torch.uint8, _encode_e8m0, _octaves, OCTAVE_SEARCH),
    "pow2": Store(torch.uint8, _encode_pow2, _octaves, OCTAVE_SEARCH, base_of="row", fit_base=_plain),
    "e4m3": _minifloat("fp8_e4m3"),
    "e3m4": _minifloat("fp8_e3m4", signed=True),
    "int": _multiples(_whole),
    "pow2:1": _multiples(lambda fmt: (1, 2)),
    "pow2:2": _multiples(lambda fmt: (1, 2, 4)),
    "pow2:3": _multiples(lambda fmt: (1, 2, 4, 8)),
}

TABLE = "table"  # in place of scales the values themselves: dmquant.grids.table
LEVELS = "levels"  # scales of groups, and behind them that of the output: dmquant.exchange.levels
TABLES = {
    TABLE: Store(torch.bfloat16, lambda tables, fmt, base: tables.bfloat16(), _as_float, search=()),
    LEVELS: Store(
        torch.uint8,
        STORES["e4m3"].encode,
        lambda stored, base: torch.cat([get_format("fp8_e4m3").decode(stored), base], 1),
        FINE_SEARCH,
        base_of="row",
        fit_base=lambda largest, fmt: (largest / 127).clamp(min=SMALLEST),
    ),
}


def get_store(name: str) -> Store:
    """The store of scales, or tables, of a name that is known to exist."""
    return STORES[name] if name in STORES else TABLES[name]


def register(name: str, store: Store) -> None:
    """Make a store of scales known by this name to recipes and specifications; UsageError for a name that is taken."""
    if name in (*STORES, *TABLES):
        raise UsageError(f"there is a scale store '{name}' already: choose another name")
    STORES[name] = store
