"""Tensors in 8 and 4 bits: the moments of Adam, weights with stochastic rounding, the basis of a subspace."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2048  # moments that share a scale (Dettmers et al., arXiv 2110.02861, section 2.1)
GROUP = 256  # weights, or elements of a basis, that share a range (Q-GaLore's code)
SPARE = 0.125  # of a range, on both sides: without it every step would need a new one, and round all weights anew
PART = 1 << 18  # elements converted at once, so that nothing in float of the size of a tensor is needed
_TINY = torch.finfo(torch.float32).tiny


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, ascending in [-1, 1] or [0, 1], of dynamic tree quantization (arXiv 2110.02861, section 1.3).

    Seven decades, each with twice as many values as the one below it; float32.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        means = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)
        values += [means, -means] if signed else [means]
    return torch.cat(values).sort().values


@dataclass
class Moments:
    """A tensor in the values of `dynamic_map` times the largest magnitude of each block."""

    codes: Tensor
    """uint8, in the tensor's shape."""
    largest: Tensor
    """float32 (blocks,)."""
    signed: bool

    @classmethod
    def zeros(cls, shape: tuple[int, ...], signed: bool, device: torch.device) -> "Moments":
        """Zeros of this shape."""
        zero = int(torch.searchsorted(dynamic_map(signed), 0.0))
        codes = torch.full(shape, zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-codes.numel() // BLOCK), device=device, dtype=torch.float32), signed)

    def decode(self) -> Tensor:
        """The values, float32."""
        values = dynamic_map(self.signed).to(self.codes.device)[self.codes.flatten().int()]
        scale = self.largest.repeat_interleave(BLOCK)[: values.numel()]
        return (values * scale).view(self.codes.shape)

    def encode(self, values: Tensor) -> None:
        """Hold the nearest to float32 `values` of the same shape."""
        blocks = F.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        self.largest = blocks.abs().amax(1)
        known = dynamic_map(self.signed).to(values.device)
        places = torch.bucketize(blocks / self.largest.clamp(min=_TINY).unsqueeze(1), (known[1:] + known[:-1]) / 2)
        self.codes = places.flatten()[: values.numel()].to(torch.uint8).view(values.shape)


@dataclass
class Int8:
    """Weights in 256 even steps of the range of each group, which change by stochastic rounding.

    A range stays while the weights are inside: a new one rounds all of its group anew. It is wider than the weights
    by SPARE on both sides, so that it lasts.
    """

    codes: Tensor
    """uint8 (groups, GROUP)."""
    low: Tensor
    """The value of code 0, float32 (groups,)."""
    step: Tensor
    """float32 (groups,)."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, generator: torch.Generator) -> "Int8":
        """Weights of any shape."""
        groups = -(-values.numel() // GROUP)
        codes = torch.zeros(groups, GROUP, dtype=torch.uint8, device=values.device)
        step = torch.zeros(groups, device=values.device, dtype=torch.float32)
        weights = cls(codes, torch.full_like(step, torch.inf), step, tuple(values.shape))
        weights.assign(values, generator)
        return weights

    def decode(self) -> Tensor:
        """The values, float32 in `shape`."""
        values = torch.empty(self.codes.shape, device=self.codes.device, dtype=torch.float32)
        size = PART // GROUP
        for start in range(0, len(values), size):
            part = slice(start, start + size)
            torch.mul(self.codes[part], self.step[part, None], out=values[part])
            values[part] += self.low[part, None]
        return values.flatten()[: _count(self.shape)].view(self.shape)

    def assign(self, values: Tensor, generator: torch.Generator) -> None:
        """Hold float32 `values` of the same shape: up with a probability that makes the mean exact."""
        flat, size = values.reshape(-1), PART // GROUP
        for start in range(0, len(self.codes), size):
            part = slice(start, start + size)
            groups = flat[start * GROUP : (start + size) * GROUP]
            groups = F.pad(groups, (0, -len(groups) % GROUP)).view(-1, GROUP)
            least, most = groups.amin(1), groups.amax(1)
            spare = (most - least).clamp(min=_TINY * 1e6) * SPARE
            outside = (least < self.low[part]) | (most > self.low[part] + 255 * self.step[part])
            self.low[part] = torch.where(outside, least - spare, self.low[part])
            self.step[part] = torch.where(outside, (most - least + 2 * spare) / 255, self.step[part])
            place = (groups - self.low[part, None]) / self.step[part, None]
            drawn = torch.rand(place.shape, generator=generator, device=place.device, dtype=torch.float32)
            self.codes[part] = (place + drawn).floor_().clamp_(0, 255).to(torch.uint8)


@dataclass
class Int4:
    """A matrix in 16 even steps of the range of each group of its elements, two codes a byte."""

    packed: Tensor
    """uint8 (groups, GROUP / 2)."""
    low: Tensor
    step: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor) -> "Int4":
        """The nearest to float32 values of any shape."""
        groups = F.pad(values.flatten(), (0, -values.numel() % GROUP)).view(-1, GROUP)
        low, step = groups.amin(1), (groups.amax(1) - groups.amin(1)).clamp(min=_TINY * 1e6) / 15
        codes = ((groups - low[:, None]) / step[:, None]).round_().to(torch.uint8)
        return cls(codes[:, ::2] | codes[:, 1::2] << 4, low, step, tuple(values.shape))

    def decode(self) -> Tensor:
        """The values, float32 in `shape`."""
        codes = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        values = codes * self.step[:, None] + self.low[:, None]
        return values.flatten()[: _count(self.shape)].view(self.shape)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
