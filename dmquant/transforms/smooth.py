"""Smooth: divide each input channel by a factor and multiply its weights by it, so that both are easier to quantize.

SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4: s = max|X|^alpha / max|W|^(1 - alpha). One weight serves all
timesteps and so does its factor, but the maxima may come from any range of timesteps. Maxima and alpha are chosen for
each layer by the error of its output on calibration data from the whole schedule.
"""

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dmquant.transforms.interfaces import Fit, Folding, InputStatistics, Method, Part, Parts, Storage, per_channel
from dmquant.transforms.pair import Pair

_NO_RANGE = 1e-9


class Options(BaseModel, extra="forbid"):
    """Options of smoothing in a recipe."""

    alpha: list[float] = Field(default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1)
    """Candidates beside no smoothing. 1: all of the difficulty moves from the input to the weight."""
    ranges: int = Field(default=1, ge=1)
    """Timestep ranges whose maxima of the input are tried too, each range's own and their geometric mean."""
    fold: bool = True
    """Whether the layer before takes the factor over where that is exact."""


class Smooth(Storage):
    """y = (W / f) (f x), with f = 1 / s stored in bfloat16, or folded into the layer before (calib.layers.folding)."""

    name = "smooth"
    STAGE = 10
    CHANGES_INPUT = True
    GROUPED = False

    def parts(self) -> dict[str, Part]:
        return {"factor": Part((1, self.shape[1]), torch.bfloat16)}

    def to_quantize(self, weight: Tensor, parts: Parts) -> Tensor:
        return weight / per_channel(parts["factor"].float(), weight)

    def undo(self, weight: Tensor, parts: Parts) -> Tensor:
        return weight * per_channel(parts["factor"].float(), weight)

    def input(self, x: Tensor, parts: Parts, dim: int) -> Tensor:
        return x * parts["factor"].to(x.dtype).view(-1, *[1] * (-1 - dim))


class Balance(Fit):
    """No smoothing, and every alpha with every maximum of the input."""

    def candidates(self, storage: Smooth, weight: Tensor, statistics: InputStatistics | None) -> list[Parts]:
        return [{"factor": factor.view(1, -1)} for factor in factors(weight, storage.options, statistics)]


def factors(weight: Tensor, options: Options, statistics: InputStatistics | None) -> list[Tensor]:
    """1 / s, SmoothQuant, eq. 4, for each alpha and each maximum of the input, behind 1; bfloat16 (channels,).

    `weight` is float32 (output channels, channels, ...).
    """
    largest = weight.abs().transpose(0, 1).flatten(1).amax(1)
    found = [torch.ones_like(largest)]
    for x in [] if statistics is None else _maxima(statistics.absmax.to(largest)):
        moved = (x > _NO_RANGE) & (largest > _NO_RANGE)
        for alpha in options.alpha:
            factor = largest ** (1 - alpha) / x.clamp(min=_NO_RANGE) ** alpha
            found.append(torch.where(moved, factor, 1.0))
    return list({tuple(stored.tolist()): stored for stored in map(Tensor.bfloat16, found)}.values())


def _maxima(absmax: Tensor) -> list[Tensor]:
    """Candidate maxima, each (channels,): the maxima over all ranges, those of each range, their geometric mean.

    The mean of a channel leaves out ranges in which it is zero.
    """
    overall = absmax.amax(0)
    if len(absmax) == 1:
        return [overall]
    logarithms = torch.where(absmax > _NO_RANGE, absmax, torch.nan).log().nanmean(0)
    return [overall, *absmax, logarithms.exp().nan_to_num(0.0)]


def _folding(options: Options) -> Folding | None:
    def of_pair(pair: Pair, statistics: InputStatistics | None) -> list[Tensor]:
        weights = torch.cat([layer.weight.detach().float() for layer in pair.seconds])
        return [factor.float() for factor in factors(weights, options, statistics)]

    return Folding(of_pair, chosen=True) if options.fold else None


METHOD = Method(Options, Smooth, fit=lambda options: Balance(statistics=options.ranges), folding=_folding)
