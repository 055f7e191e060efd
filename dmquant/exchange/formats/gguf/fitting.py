"""Scales, minima and codes of GGUF's blocks that lose least output, by what an error of each input channel costs.

A block's error is sum h (w - w')^2, h being the mean square of the input's channel, or 1 where nothing is known: the
error of the output for channels that are independent. Scales are tried as they are stored, in half precision. The
candidates are those of llama.cpp (make_qx_quants, make_qkx3_quants): multiples of the range, each followed by the
scale and minimum of least squares for its codes; what is decided is the error of the stored numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 65504.0  # of half precision
MULTIPLES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
WIDENINGS = (-0.9, -0.3, 0.3, 0.9, 1.5, 2.1)
TURNS = 3
SUPER, SUBBLOCKS, SIXTH_BIT = 256, 8, 63  # of K-quants: weights, their blocks, and the largest whole scale

Round = Callable[[Tensor], Tensor]


class Symmetric(NamedTuple):
    """Blocks w' = d q, q among given levels: the nearest of them, and the levels that the largest weight may become."""

    round: Round
    ends: tuple[float, ...]
    multiples: tuple[float, ...] = MULTIPLES

    def fit(self, x: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Scales d (..., 1) and levels q (..., n) for blocks `x` (..., n); `cost` broadcasts to `x`; all float32."""
        peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        least, best = torch.full_like(peak, torch.inf), torch.zeros_like(peak)
        for end in self.ends:
            for multiple in self.multiples:
                codes = self.codes(x, half(peak * (multiple / end)))
                scale = half((cost * x * codes).sum(-1, True) / positive((cost * codes.square()).sum(-1, True)))
                error = (cost * (self.codes(x, scale) * scale - x).square()).sum(-1, True)
                least, best = torch.minimum(error, least), torch.where(error < least, scale, best)
        return best, self.codes(x, best)

    def codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """The levels nearest to `x`; 0 where the scale is 0."""
        return self.round(torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale)))


def whole(low: int, high: int) -> Round:
    """Rounding to the whole numbers from `low` to `high`."""
    return lambda x: x.round().clamp_(low, high)


def of_halves(levels: Tensor) -> Round:
    """Rounding to the nearest of whole levels, ascending; all midpoints are whole numbers of halves."""
    low, high = (int(level) for level in levels[[0, -1]])
    nearest = torch.bucketize(
        torch.arange(2 * low, 2 * high + 1).float() / 2, (levels[1:] + levels[:-1]) / 2, right=True
    )
    table = levels[nearest]
    return lambda x: table[(x * 2).floor_().clamp_(2 * low, 2 * high).sub_(2 * low).int()]


def half(x: Tensor) -> Tensor:
    """The nearest numbers of half precision, float32."""
    return x.clamp(-LARGEST, LARGEST).half().float()


def positive(x: Tensor) -> Tensor:
    """`x`, with 1 in the place of 0, to divide by."""
    return torch.where(x == 0, 1.0, x)


class KBlocks(NamedTuple):
    """K-quants' blocks of 256 weights: w' = d s q - D m, with s and m of 6 bits for each 32 weights; float32.

    Shapes: d and D (..., 1, 1), s and m (..., 8, 1), q (..., 8, 32).
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor
    codes: Tensor


def fit_k(x: Tensor, cost: Tensor, top: int) -> KBlocks:
    """Fit blocks `x` (..., 8, 32), float32, whose codes go from 0 to `top`; `cost` broadcasts to `x`.

    The super-block's two factors and the whole numbers of its blocks are improved in turns, each where it lowers the
    error of what is stored.
    """
    scale, minimum = _affine(x, cost, top)
    d, dmin = (half(one.amax(-2, True) / SIXTH_BIT) for one in (scale, minimum))
    best = _rounded(x, d, dmin, scale, minimum, top)
    least = _error(x, cost, best).sum(-2, True)
    for _ in range(TURNS):
        found = _neighbours(x, cost, best, top)
        d, dmin = _factors(x, cost, found)
        again = found._replace(d=d, dmin=dmin)
        again = again._replace(codes=_codes(x, again, top))
        for tried in (found, again):
            error = _error(x, cost, tried).sum(-2, True)
            better = error < least
            best = KBlocks(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
            least = torch.minimum(error, least)
    return best


def _affine(x: Tensor, cost: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """For each block of the last dimension the scale and the minimum (>= 0) of w' = scale q - minimum; (..., 1)."""
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True)
    total, weighted = cost.expand_as(x).sum(-1, True), (cost * x).sum(-1, True)
    least = torch.full_like(low, torch.inf)
    best = torch.zeros_like(low), torch.zeros_like(low)
    for widening in WIDENINGS:
        step = positive((high - low) / (top + widening))
        codes = ((x - low) / step).round_().clamp_(0, top)
        costly = cost * codes
        first, second, product = costly.sum(-1, True), (costly * codes).sum(-1, True), (costly * x).sum(-1, True)
        determinant = positive(total * second - first.square())
        scale = (total * product - weighted * first) / determinant
        bottom = (second * weighted - first * product) / determinant
        outside = bottom > 0  # minima are subtracted: they cannot lift
        scale, bottom = torch.where(outside, product / positive(second), scale), bottom.clamp(max=0)
        error = (cost * (scale * codes + bottom - x).square()).sum(-1, True)
        better = (error < least) & (scale >= 0)
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, -bottom, best[1])
    return best


def _rounded(x: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, minimum: Tensor, top: int) -> KBlocks:
    whole = (
        (one / positive(factor)).round().clamp(0, SIXTH_BIT).expand_as(scale)
        for one, factor in ((scale, d), (minimum, dmin))
    )
    blocks = KBlocks(d, dmin, *whole, x)
    return blocks._replace(codes=_codes(x, blocks, top))


def _codes(x: Tensor, blocks: KBlocks, top: int) -> Tensor:
    scale = blocks.d * blocks.scales
    codes = ((x + blocks.dmin * blocks.minima) / positive(scale)).round_().clamp_(0, top)
    return torch.where(scale == 0, 0.0, codes)


def _error(x: Tensor, cost: Tensor, blocks: KBlocks) -> Tensor:
    values = blocks.d * blocks.scales * blocks.codes - blocks.dmin * blocks.minima
    return (cost * (values - x).square()).sum(-1, True)


def _neighbours(x: Tensor, cost: Tensor, blocks: KBlocks, top: int) -> KBlocks:
    """Each block's best whole scale and minimum among those up to 1 away."""
    best, least = blocks, _error(x, cost, blocks)
    for up in (-1, 0, 1):
        for lift in (-1, 0, 1):
            moved = blocks._replace(
                scales=(blocks.scales + up).clamp(0, SIXTH_BIT), minima=(blocks.minima + lift).clamp(0, SIXTH_BIT)
            )
            moved = moved._replace(codes=_codes(x, moved, top))
            error = _error(x, cost, moved)
            better = error < least
            chosen = (
                torch.where(better, getattr(moved, name), getattr(best, name)) for name in ("scales", "minima", "codes")
            )
            best, least = KBlocks(blocks.d, blocks.dmin, *chosen), torch.minimum(error, least)
    return best


def _factors(x: Tensor, cost: Tensor, blocks: KBlocks) -> tuple[Tensor, Tensor]:
    """d and D of least squares for given codes, in half precision; d alone where D would be negative."""
    high, low = blocks.scales * blocks.codes, blocks.minima.expand_as(x)

    def total(one: Tensor, other: Tensor) -> Tensor:
        return (cost * one * other).sum((-2, -1), keepdim=True)

    squares, cross, lows = total(high, high), total(high, low), total(low, low)
    with_high, with_low = total(high, x), total(low, x)
    determinant = squares * lows - cross.square()
    solvable = determinant > 1e-6 * squares * lows
    d = torch.where(solvable, (lows * with_high - cross * with_low) / positive(determinant), blocks.d)
    dmin = torch.where(solvable, (cross * with_high - squares * with_low) / positive(determinant), blocks.dmin)
    usable = (d >= 0) & (dmin >= 0)
    return half(torch.where(usable, d, blocks.d)), half(torch.where(usable, dmin, blocks.dmin))
