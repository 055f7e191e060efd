"""Formats without structure: any values, by table."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LookupFormat:
    """Any ascending `table` of 2 to 256 finite values; a code is a value's index.

    Values that a dtype cannot hold exactly are rounded to it. Raises ValueError if the table is not like that.
    """

    name: str
    table: tuple[float, ...]
    # The last float32 that rounds to each value but the highest: the midpoint, or just below it where a tie goes up.
    ends: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in pairwise(self.table))
        if not (ascending and 2 <= len(self.table) <= 256 and all(map(math.isfinite, self.table))):
            raise ValueError(f"the table of format '{self.name}' must hold 2 to 256 finite values in ascending order")
        midpoints = [(low + high) / 2 for low, high in pairwise(self.table)]
        last = (middle if code % 2 == 0 else math.nextafter(middle, -math.inf) for code, middle in enumerate(midpoints))
        object.__setattr__(self, "ends", tuple(map(_float32_below, last)))

    @cached_property
    def _cells(self) -> tuple[float, int, list[int], list[float]]:
        """A width, a power of two, such that no interval [n, n + 1) of it holds two of `ends`; the first n that holds
        one; from there on the number of ends before each interval, and the end in it or infinity."""
        width = 2.0 ** math.floor(math.log2(min((high - low for low, high in pairwise(self.ends)), default=1.0)))
        held = {math.floor(end / width): end for end in self.ends}
        span = range(min(held), max(held) + 1)
        return width, span[0], [bisect_left([*held], n) for n in span], [held.get(n, math.inf) for n in span]

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
        width, first, before, ends = self._cells
        wide = x.detach().float()
        n = (wide / width).clamp_(first, first + len(ends) - 1).nan_to_num_(first).floor_().int().sub_(first).flatten()
        found = torch.tensor(before, device=x.device), torch.tensor(ends, dtype=torch.float32, device=x.device)
        codes, end = (each.index_select(0, n).view(x.shape) for each in found)
        return (codes + (wide > end)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.tensor(self.table, dtype=torch.float32, device=codes.device).to(dtype)
        return values.index_select(0, (codes & (2**self.bits - 1)).flatten().int()).view(codes.shape)


def _float32_below(number: float) -> float:
    """The largest float32 that is not above a number."""
    nearest = np.float32(number)
    return float(nearest if float(nearest) <= number else np.nextafter(nearest, np.float32(-math.inf)))


# NormalFloat4: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E.
# fmt: off
NF4 = LookupFormat("lut4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
# Integers fitted to normal numbers in groups of 16 and of 32 whose scales have either sign (store: e3m4). The ends are
# as unequal as those of ggml's IQ4_NL, which has no zero.
NL4 = LookupFormat("nl4", (-127, -103, -81, -63, -48, -34, -21, -10, 0, 12, 24, 37, 51, 66, 84, 109))
# The same with eight values, of either end the more.
NL3 = LookupFormat("nl3", (-127, -82, -48, -20, 5, 30, 58, 97))
# Of least error for values of a normal distribution in groups of 16, over the group's largest: comfy-kitchen's default.
GAUSSIAN = LookupFormat("lut4_gaussian", (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
))
# ggml's kvalues_iq4nl (ggml-common.h): GGUF's type of 4.5 bits whose levels are denser near zero.
IQ4_NL = LookupFormat("iq4_nl", (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
))
# fmt: on
