"""Scales: the elements that share one, and the rules that fit it.

A scale is quantized first and the weights afterwards with the scale as stored, so the fitted scale is the one used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmquant.errors import unknown
from dmquant.formats import Format
from dmquant.stores import LARGEST, SMALLEST, STORES, get_store

GRADIENT_STEPS, GRADIENT_RATE = 100, 0.03
OF_INPUTS = ("token", "image", "product")
STEPS, BASES = 8, range(-10, 4)  # bases that are tried: those of absmax times 2^(n / STEPS)


@dataclass(frozen=True)
class Granularity:
    """The elements that share a scale: the whole `tensor`, a `channel`, a `group` of `size` elements; of an input, a
    `token`, all of an `image`, or what one integer `product` allows: a token, under a kernel of several positions an
    image."""

    kind: str
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Granularity":
        """`tensor`, `channel`, `group:N`, `token`, `image` or `product`; anything else is a UsageError."""
        kind, _, size = text.partition(":")
        if kind == "group" and size.isdecimal() and len(size) < 6 and int(size) > 0:
            return cls(kind, int(size))
        if kind in ("tensor", "channel", *OF_INPUTS) and not size:
            return cls(kind)
        likely = ("tensor", "channel", *OF_INPUTS, "group:64")
        raise unknown("granularity", text, likely, "use tensor, channel, group:N, token, image, product")

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}:{self.size}"


class BlockFormat(NamedTuple):
    """A format together with the group size and scale storage that a standard prescribes."""

    format: str
    granularity: str
    store: str


BLOCK_FORMATS = {  # OCP Microscaling Formats (MX) 1.0; NVIDIA's NVFP4 has a float32 tensor scale, E4M3 group scales
    "mxfp4": BlockFormat("fp4_e2m1", "group:32", "e8m0"),
    "mxfp6": BlockFormat("fp6_e2m3", "group:32", "e8m0"),
    "mxfp8": BlockFormat("fp8_e4m3", "group:32", "e8m0"),
    "nvfp4": BlockFormat("fp4_e2m1", "group:16", "e4m3"),
}


def to_groups(matrix: Tensor, granularity: Granularity, segments: tuple[int, ...] | None = None) -> Tensor:
    """View (rows, columns) as (scale rows, scale columns, elements sharing a scale); same dtype.

    `segments` are the numbers of columns of the parts of a row that share no scale; by default all are one part. The
    last group of a part may be shorter: it is padded with zeros, which change neither its absmax nor its error.
    """
    segments = segments or (matrix.shape[1],)
    size = granularity.size or max(segments)
    if any(columns % size for columns in segments):
        matrix = _side_by_side([F.pad(part, (0, -part.shape[1] % size)) for part in matrix.split(segments, 1)])
    groups = matrix.reshape(len(matrix), matrix.shape[1] // size, size)
    return groups.transpose(0, 1).reshape(1, groups.shape[1], -1) if granularity.kind == "tensor" else groups


def from_groups(groups: Tensor, granularity: Granularity, segments: tuple[int, ...]) -> Tensor:
    """Undo `to_groups`: (scale rows, scale columns, elements) to (rows, columns), without padding; same dtype."""
    size = granularity.size or max(segments)
    if granularity.kind == "tensor":
        groups = groups.unflatten(-1, (-1, size)).squeeze(0).transpose(0, 1)
    matrix = groups.flatten(1)
    if any(columns % size for columns in segments):
        parts = matrix.split([columns + -columns % size for columns in segments], 1)
        matrix = _side_by_side([part[:, :columns] for part, columns in zip(parts, segments, strict=True)])
    return matrix


def to_matrix(weight: Tensor, split: int | None = None) -> Tensor:
    """The matrix form (rows, columns) of a weight (rows, input channels, ...), channels last; same dtype.

    Columns run over the positions of the kernel and, within each, over the input channels, as an implicit GEMM reads
    them. With `split`, all columns of the first `split` channels come before the columns of the others.
    """
    if split is None or weight.ndim == 2:
        return weight.movedim(1, -1).flatten(1)
    return torch.cat([to_matrix(weight[:, :split]), to_matrix(weight[:, split:])], 1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], split: int | None = None) -> Tensor:
    """Undo `to_matrix` for a weight of this shape; same dtype.

    A convolution's weight comes in the memory format channels last, as a view where it can.
    """
    rows, channels, *kernel = shape
    positions = math.prod(kernel)
    if positions == 1:
        return matrix.reshape(shape)
    if split is None:
        return matrix.unflatten(1, (*kernel, channels)).movedim(-1, 1)
    first, rest = matrix.split((split * positions, (channels - split) * positions), 1)
    halves = from_matrix(first, (rows, split, *kernel)), from_matrix(rest, (rows, channels - split, *kernel))
    return torch.cat(halves, 1)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]  # cat would copy one alone


@dataclass(frozen=True)
class Scales:
    """Fitted scales as stored, and the float32 base that they are relative to, if any; or the tables of all rows."""

    stored: Tensor
    base: Tensor | None
    store: str

    def decode(self) -> Tensor:
        """Float32 scales, (scale rows, scale columns), or tables."""
        return get_store(self.store).decode(self.stored, self.base)


def absmax(groups: Tensor) -> Tensor:
    """Largest magnitude of every group, (scale rows, scale columns); at least the smallest normal float32."""
    return groups.abs().amax(-1).clamp(min=SMALLEST)


def fit_absmax(groups: Tensor, fmt: Format, store: str, base: Tensor | None = None) -> Scales:
    """The largest magnitude of a group becomes the largest value of the format (e8m0: OCP MX 1.0, section 6.3).

    `groups` (scale rows, scale columns, elements) float32 to scales (scale rows, scale columns), as stored. They are
    relative to `base`, (scale rows or 1, 1) float32, by default fitted to `groups`; parts of a tensor share its base.
    """
    amplitude = absmax(groups)
    base = STORES[store].base(amplitude, fmt) if base is None else base
    return Scales(STORES[store].encode(amplitude, fmt, base), base, store)


def fit_mse(groups: Tensor, fmt: Format, store: str, base: Tensor | None = None) -> Scales:
    """The multiple of absmax with the least squared weight error, absmax included; shapes as `fit_absmax`."""
    return search(groups, fmt, store, lambda error: error.square_().sum(-1), base)


def fit_gradient(groups: Tensor, fmt: Format, store: str, base: Tensor | None = None) -> Scales:
    """The scale of least squared weight error, found by its gradient from absmax (EasyQuant, arXiv 2403.02775).

    With the codes c = Q(x / s) held, d sum (s c - x)^2 / ds = 2 sum (s c - x) c: exact but where a code changes. Adam
    on log s, each scale tried as it is stored; every group keeps its best. Shapes as `fit_absmax`.
    """
    kind, best = STORES[store], fit_absmax(groups, fmt, store, base)
    amplitude, chosen = absmax(groups), best.stored
    largest, smallest = (torch.full_like(amplitude, limit) for limit in (LARGEST, SMALLEST))
    shift, mean, square = (torch.zeros_like(amplitude) for _ in range(3))
    least = torch.full_like(amplitude, math.inf)
    for step in range(1, GRADIENT_STEPS + 1):
        tried = (amplitude * shift.exp()).minimum(largest).maximum(smallest)
        stored = best.stored if step == 1 else kind.encode(tried, fmt, best.base)
        scale = kind.decode(stored, best.base).unsqueeze(-1)
        values = fmt.round(groups / scale).mul_(scale)
        lost = values - groups
        error = lost.square().sum(-1)
        better = error < least
        chosen, least = torch.where(better, stored, chosen), torch.where(better, error, least)
        # The gradient by log s, over the squared weights: s c is the value itself.
        slope = 2 * values.mul_(lost).sum(-1) / groups.square().sum(-1).clamp(min=SMALLEST)
        mean.lerp_(slope, 0.1)
        square.lerp_(slope.square(), 0.001)
        unbiased = mean / (1 - 0.9**step), (square / (1 - 0.999**step)).sqrt() + 1e-12
        shift -= GRADIENT_RATE * unbiased[0] / unbiased[1]
    return Scales(chosen, best.base, store)


def search(
    groups: Tensor,
    fmt: Format,
    store: str,
    measure: Callable[[Tensor], Tensor],
    base: Tensor | None = None,
    further=(),
    multiples: tuple[float, ...] = (),
) -> Scales:
    """The scale of least error among `multiples` of absmax, by default the store's and `further` ones, by group.

    Shapes as `fit_absmax`. `measure`: weight errors, shaped as `groups`, -> errors (scale rows, scale columns).
    """
    amplitude, kind = absmax(groups), STORES[store]
    if kind.factors:
        return _search_base(groups, fmt, fit_absmax(groups, fmt, store, base), measure)
    base = kind.base(amplitude, fmt) if base is None else base
    multiples = amplitude.new_tensor(multiples or kind.tried(fmt, *further)).view(-1, 1, 1)
    tried = kind.encode(amplitude * multiples, fmt, base)
    errors = (measure(_rounding_error(groups, scale, fmt)) for scale in kind.decode(tried, base))
    chosen, least = tried[0], next(errors)
    for candidate, error in zip(tried[1:], errors, strict=True):
        better = error < least
        chosen, least = torch.where(better, candidate, chosen), torch.where(better, error, least)
    return Scales(chosen, base, store)


def _search_base(groups: Tensor, fmt: Format, start: Scales, measure: Callable[[Tensor], Tensor]) -> Scales:
    """The base of each row with the least sum of errors, every group with its best factor of it; never worse than
    `start`, which is absmax. The base is searched on a grid of STEPS an octave, each factor being its nearest place."""
    kind, factors = STORES[start.store], STORES[start.store].factors(fmt)
    places = [round(STEPS * math.log2(factor)) for factor in factors]

    def error(scale: Tensor) -> Tensor:
        return measure(_rounding_error(groups, scale.expand(groups.shape[:2]), fmt))

    tried = sorted({step + place for step in BASES for place in places})
    errors = {place: error(start.base * 2.0 ** (place / STEPS)) for place in tried}
    totals = [torch.stack([errors[step + place] for place in places]).amin(0).sum(-1, keepdim=True) for step in BASES]
    step = torch.stack(totals).argmin(0) + BASES[0]
    base = kind.fit_base(start.base * torch.exp2(step.float() / STEPS) * (fmt.max * factors[-1]), fmt)
    least, chosen = torch.stack([error(base * factor) for factor in factors]).min(0)
    stored = groups.new_tensor(factors, dtype=torch.uint8)[chosen]
    better = least.sum(-1, keepdim=True) < error(start.decode()).sum(-1, keepdim=True)
    return Scales(torch.where(better, stored, start.stored), torch.where(better, base, start.base), start.store)


def _rounding_error(groups: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    scale = scale.unsqueeze(-1)
    return fmt.round(groups / scale).mul_(scale).sub_(groups)


def _of_least_error(*multiples: float) -> Callable[..., Scales]:
    """A rule that tries these multiples of absmax beside itself; shapes as `fit_absmax`."""

    def fit(groups: Tensor, fmt: Format, store: str, base: Tensor | None = None) -> Scales:
        return search(groups, fmt, store, lambda error: error.square_().sum(-1), base, multiples=(1.0, *multiples))

    return fit


RULES: dict[str, Callable[..., Scales]] = {"absmax": fit_absmax, "mse": fit_mse, "gradient": fit_gradient}
ONLINE_RULES: dict[str, Callable[..., Scales]] = {  # of activations
    "absmax": fit_absmax,
    "four-over-six": _of_least_error(1.5),  # FP4's largest value 6 or 4: Cook et al., arXiv 2512.02010
    "mse": _of_least_error(0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5),  # twice as many lower the error by 2 % more
}
DATA_RULES = ("hessian", "lean")  # fitted where calibration data is at hand
