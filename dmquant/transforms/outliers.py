"""Outliers: the few weights farthest from the mean stay in 16 bits with their place, the rest is quantized.

EasyQuant, Tang et al., arXiv 2403.02775. There a threshold of 3 standard deviations decides how many,
which gives 0.3 to 0.8 % of a weight; here the share is fixed, so that the shape alone says how many there are.
"""

import math

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dmquant.transforms.interfaces import Fit, InputStatistics, Method, Part, Parts, Storage


class Options(BaseModel, extra="forbid"):
    """Options of outliers in a recipe."""

    share: float = Field(default=0.005, gt=0, le=1)
    """Share of a layer's weights."""


class Outliers(Storage):
    """Sparse rows of the weight's matrix (rows, input channels * kernel): the count of each, columns and values.

    The rounding error of an outlier in bfloat16 is quantized with the rest: nothing is lost before quantization.
    """

    name = "outliers"
    STAGE = 20

    @property
    def count(self) -> int:
        return math.ceil(self.options.share * math.prod(self.shape))

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.int16 if math.prod(self.shape[1:]) < 1 << 15 else torch.int32

    def parts(self) -> dict[str, Part]:
        return {
            "counts": Part((self.shape[0], 1), self.index_dtype),
            "columns": Part((1, self.count), self.index_dtype),
            "values": Part((1, self.count), torch.bfloat16),
        }

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        flat = weight.flatten().scatter_add(0, self._places(parts), -parts["values"].flatten().to(weight.dtype))
        return flat.view(self.shape)

    def complete(self, weight: Tensor, parts: Parts) -> Tensor:
        flat = weight.flatten().scatter_add(0, self._places(parts), parts["values"].flatten().to(weight.dtype))
        return flat.view(self.shape)

    def _places(self, parts: Parts) -> Tensor:
        """Indices of the outliers in the flattened weight, (outliers,) int64."""
        rows = torch.arange(self.shape[0], device=parts["counts"].device)
        rows = rows.repeat_interleave(parts["counts"].flatten().long(), output_size=self.count)
        return rows * math.prod(self.shape[1:]) + parts["columns"].flatten().long()

    def __str__(self) -> str:
        return f"outliers:{self.options.share:g}"


class Farthest(Fit):
    """The weights of the largest |w - mean|."""

    def candidates(self, storage: Outliers, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        distance = (weight - weight.mean()).abs().flatten()
        chosen = distance.topk(storage.count).indices.sort().values
        width, dtype = math.prod(storage.shape[1:]), storage.index_dtype
        counts = torch.bincount(chosen // width, minlength=storage.shape[0]).to(dtype).view(-1, 1)
        values = weight.flatten()[chosen].bfloat16().view(1, -1)
        return [{"counts": counts, "columns": (chosen % width).to(dtype).view(1, -1), "values": values}]


METHOD = Method(Options, Outliers, fit=lambda options: Farthest())
