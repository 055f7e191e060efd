"""Straight-through rounding of latent weights onto a grid whose scales may be learned."""

from typing import Any

import torch
from torch import Tensor

from dmquant.calib.tuning.eight_bit import PART
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
    """Latent weights, in units of `unit`, rounded to codes times the scale that their group has now.

    The gradient of a latent weight is that of its value; beyond the format's range it is zero unless it leads back. The
    gradient of a scale is the code less the latent inside, and the code beyond (Esser et al., arXiv 1902.08153,
    equation 3). Rows are computed a few at a time, as what lies between would take many times the weight's memory.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, unit: Tensor, spec: WeightSpec, grouped: Grouped) -> Tensor:
        """Values (rows, columns) of `latent` (rows, columns), decoded scales and units (scale rows, scale columns), all
        float32."""
        limits = spec.fmt.values[0], spec.fmt.values[-1]
        values, kept = torch.empty_like(latent), []
        for part in _parts(latent, scale):
            quotients = grouped.split(latent[part]) * (unit[part] / scale[part]).unsqueeze(-1)
            codes = spec.fmt.round(quotients)
            beyond = (quotients > limits[1]).to(torch.int8) - (quotients < limits[0]).to(torch.int8)
            by_scale = torch.where(beyond == 0, codes - quotients, codes) if ctx.needs_input_grad[1] else None
            values[part] = grouped.join(codes * scale[part].unsqueeze(-1))
            kept.append((by_scale, beyond))
        by_scale = torch.cat([one for one, _ in kept]) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(by_scale, torch.cat([one for _, one in kept]), unit)
        ctx.grouped = grouped
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_scale, beyond, unit = ctx.saved_tensors
        of_latent = torch.empty_like(gradient) if ctx.needs_input_grad[0] else None
        of_scale = torch.empty_like(unit) if ctx.needs_input_grad[1] else None
        for part in _parts(gradient, unit):
            groups = ctx.grouped.split(gradient[part])
            if of_scale is not None:
                of_scale[part] = (groups * by_scale[part]).sum(-1)
            if of_latent is not None:
                groups = groups * unit[part].unsqueeze(-1)
                of_latent[part] = ctx.grouped.join(groups * (groups * beyond[part] >= 0))
        return of_latent, of_scale, None, None, None


def _parts(matrix: Tensor, scale: Tensor) -> list[slice]:
    """Some rows at a time, or all of them where a scale is of several."""
    rows = max(1, PART // matrix.shape[1]) if len(scale) == len(matrix) else len(matrix)
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]
