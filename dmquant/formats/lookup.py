"""Formats without structure: any values, by table."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


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
# fmt: off
NF4 = LookupFormat("lut4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
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
