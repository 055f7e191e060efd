"""Straight-through rounding of latent weights onto a grid whose scales may be learned."""

from typing import Any

import torch
from torch import Tensor

from dmquant.qtensor import WeightSpec
from dmquant.rounding.straight import moved
from dmquant.scaling import Scales, from_groups, to_groups


class Grouped:
    """The groups of a weight's matrix (rows, columns), with a scale each, as (scale rows, scale columns, elements)."""

    def __init__(self, spec: WeightSpec, shape: tuple[int, ...]):
        self.granularity, self.segments = spec.granularity, spec.segments(shape)

    def split(self, matrix: Tensor) -> Tensor:
        """Groups of a matrix; same dtype."""
        return to_groups(matrix, self.granularity, self.segments)

    def join(self, groups: Tensor) -> Tensor:
        """The matrix of groups; same dtype."""
        return from_groups(groups, self.granularity, self.segments)


class StoredScale(torch.autograd.Function):
    """Multiples (rows, columns) of scales, as the store can hold them; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, multiple: Tensor, scales: Scales, spec: WeightSpec) -> Tensor:
        """Decoded scales, float32 (rows, columns), of which the stored one is the nearest to `multiple` x the old."""
        old = scales.decode()
        ctx.save_for_backward(old)
        return moved(scales, spec.fmt, multiple).decode()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


class RoundedWeight(torch.autograd.Function):
    """Latent weights, in units of the scale that their group began with, rounded to codes times the scale it has now.

    The gradient of a latent weight is that of its value; beyond the format's range it is zero unless it leads back. The
    gradient of a scale is the code less the latent inside, and the code beyond (Esser et al., arXiv 1902.08153,
    equation 3).
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, began: Tensor, spec: WeightSpec, grouped: Grouped) -> Tensor:
        """Values (rows, columns) of `latent` (rows, columns) and decoded scales (rows, columns), all float32."""
        quotients = grouped.split(latent) * (began / scale).unsqueeze(-1)
        codes = spec.fmt.round(quotients)
        limits = spec.fmt.values.nan_to_num()
        beyond = (quotients > limits.max()).to(torch.int8) - (quotients < limits.min()).to(torch.int8)
        by_scale = torch.where(beyond == 0, codes - quotients, codes) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_scale, beyond, began)
        ctx.grouped = grouped
        return grouped.join(codes * scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_scale, beyond, began = ctx.saved_tensors
        groups, of_latent = ctx.grouped.split(gradient), None
        if ctx.needs_input_grad[0]:
            of_latent = groups * began.unsqueeze(-1)
            of_latent = ctx.grouped.join(of_latent * (of_latent * beyond >= 0))
        return of_latent, None if by_scale is None else (groups * by_scale).sum(-1), None, None, None
