"""Scales of least output error, on the second moments of the inputs."""

import torch
from torch import Tensor

from dmquant.formats import Format
from dmquant.scaling import Scales, search


def fit_hessian(groups: Tensor, fmt: Format, store: str, moments: Tensor, base: Tensor | None = None) -> Scales:
    """The multiple of absmax with the least squared error of the layer's output, at nearest rounding.

    `groups` (rows, scale columns, n) float32 is the weight in groups (`to_groups`), `moments` (scale columns, n, n)
    float32 the second moments of the inputs that each group of n weights multiplies. The error of a group is e^T H e,
    as if the other groups were exact; granularity `tensor` sums it over the rows. `base` as in `fit_absmax`.
    """
    rows, columns = groups.shape[:2]
    width = moments.shape[-1]

    def output_error(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1).reshape(columns, -1, width)
        squared = (torch.bmm(by_group, moments) * by_group).sum(-1)
        return squared.view(columns, rows, -1).sum(-1).T

    return search(groups, fmt, store, output_error, base)
