"""CFP: outliers found coarse to fine. Those of a weight are cut off, channels of the input that are some scaled down.

CBQ, Ding et al., arXiv 2312.07950, section 3.2. Of sorted magnitudes those beyond the third quartile and 1.5 ranges
between quartiles may be outliers; of them those are that a gap sets apart from all below. There the gap is the one of
the largest (gap^2 - balance * variance of the candidates below), which leaves one candidate below where none is set
apart; here it is the lowest whose square is above the variance of all that stay, times `balance`.
"""

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dmquant.transforms.interfaces import Fit, InputStatistics, Method, Parts
from dmquant.transforms.smooth import Smooth


class Options(BaseModel, extra="forbid"):
    """Options of coarse-to-fine preprocessing in a recipe."""

    weights: bool = True
    """Whether outliers of the weight become the largest magnitude below them, which has to be learned back."""
    coarse: float = Field(default=1.5, ge=0)
    """Ranges between quartiles above the third one, beyond which a magnitude may be an outlier."""
    balance: float = Field(default=4.0, ge=0)
    """How far outliers have to stand off: 4 is two standard deviations of the magnitudes that stay."""


def largest_kept(values: Tensor, options: Options) -> Tensor:
    """The largest magnitude that is no outlier, a scalar; `values` are of any shape, float32. Scaling scales it."""
    magnitudes = values.abs().flatten().double().sort().values
    count = len(magnitudes)
    first, third = (magnitudes[int(quarter * (count - 1) / 4)] for quarter in (1, 3))
    coarse = int(torch.searchsorted(magnitudes, third + options.coarse * (third - first), right=True))
    kept = torch.arange(max(coarse, 1), count, device=values.device)  # how many stay if these are cut off
    gaps = magnitudes[kept] - magnitudes[kept - 1]
    mean = (magnitudes.cumsum(0)[kept - 1] / kept, magnitudes.square().cumsum(0)[kept - 1] / kept)
    apart = gaps.square() > options.balance * (mean[1] - mean[0].square()).clamp(min=0)
    places = kept[apart & (gaps > 0)]
    return magnitudes[places[0] - 1 if len(places) else -1].float()


class CoarseToFine(Smooth):
    """`smooth` by factors that are 1 but for outliers, of weights without any."""

    name = "cfp"
    STAGE = 8

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        if self.options.weights:
            limit = largest_kept(weight, self.options)
            weight = weight.clamp(-limit, limit)
        return super().to_quantize(weight, parts)


class Outlying(Fit):
    """1 / s with s = sqrt(max|X_c| / the largest of the others) for channels that are outliers, and no factors."""

    def candidates(self, storage: CoarseToFine, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        none = {"factor": weight.new_ones(1, weight.shape[1], dtype=torch.bfloat16)}
        if statistics is None:
            return [none]
        absmax = statistics.absmax.amax(0)
        limit = largest_kept(absmax, storage.options)
        factor = torch.where((absmax > limit) & (limit > 0), (limit / absmax.clamp(min=limit)).sqrt(), 1.0)
        return [none] if (factor == 1).all() else [none, {"factor": factor.to(weight).bfloat16().view(1, -1)}]


def _fit(options: Options) -> Outlying:
    return Outlying(statistics=1, optional=not options.weights)


METHOD = Method(Options, CoarseToFine, fit=_fit, loses=lambda options: options.weights)
