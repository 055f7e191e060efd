"""Distances between two sets of features: the Fréchet distance and the maximum mean discrepancy, in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

CMMD_SIGMA = 10.0
ROWS = 1024  # features that a step of the arithmetic takes at a time, so that its memory does not grow with the sets

Kernel = Callable[[Tensor, Tensor], Tensor]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to feature sets [N, D] and [M, D] (Dowson and Landau 1982).

    N and M are at least 2; the sets may be of any float dtype, and all arithmetic is float64 on their device.

    With covariances A^T A and B^T B, the trace of (A^T A B^T B)^(1/2) is the sum of the singular values of A B^T.
    Unlike eigenvalues of the product, these need no square root, which turns the rounding error of a zero eigenvalue
    into 1e-8 of the largest: with fewer images than features that adds up to an error of 1e-6 of a large FID, and to
    more of a small one.
    """
    a, b = a.double(), b.double()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    mean = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    distance = mean + traces - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(float(distance), 0.0)  # rounding can leave -1e-12 between identical sets


def squared_mmd(a: Tensor, b: Tensor, kernel: Kernel, unbiased: bool, paired: bool) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy of feature sets [N, D] and [M, D], and its standard error, in float64.

    `unbiased` is the U-statistic, without the kernel of a feature and itself (Gretton et al. 2012, equation 3), and
    without the kernels of pairs if the sets are `paired` (equation 4, whose sum of i != j holds for pairs that depend
    on one another); otherwise the V-statistic (equation 5). The error is the jackknife's over images, or over pairs of
    images; it needs three on each side, and is None with fewer.
    """
    a, b = a.double(), b.double()
    own_a, own_b = (_diagonal(kernel, x, x) for x in (a, b))
    within_a, within_b = (_sums(kernel, x, x)[0] for x in (a, b))
    between_a, between_b = _sums(kernel, a, b)
    own_between = _diagonal(kernel, a, b) if paired else None
    if unbiased:
        within_a, within_b = within_a - own_a, within_b - own_b
        own_a, own_b = torch.zeros_like(own_a), torch.zeros_like(own_b)
        if paired:
            between_a, between_b = between_a - own_between, between_b - own_between
            own_between = torch.zeros_like(own_between)

    def value(sum_a: Tensor, n: int, sum_b: Tensor, m: int, sum_between: Tensor) -> Tensor:
        pairs_a, pairs_b = (k * (k - 1) if unbiased else k * k for k in (n, m))
        pairs_between = pairs_a if paired else n * m
        return sum_a / pairs_a + sum_b / pairs_b - 2 * sum_between / pairs_between

    n, m = len(a), len(b)
    sum_a, sum_b, sum_between = within_a.sum(), within_b.sum(), between_a.sum()
    distance = float(value(sum_a, n, sum_b, m, sum_between))
    if min(n, m) < 3:
        return distance, None
    without_a, without_b = sum_a - 2 * within_a + own_a, sum_b - 2 * within_b + own_b
    if paired:
        left = sum_between - between_a - between_b + own_between
        variance = _jackknife_variance(value(without_a, n - 1, without_b, m - 1, left))
    else:
        variance = _jackknife_variance(value(without_a, n - 1, sum_b, m, sum_between - between_a))
        variance += _jackknife_variance(value(sum_a, n, without_b, m - 1, sum_between - between_b))
    return distance, math.sqrt(variance)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x·y / D + 1)^3 between all rows of [..., N, D] and [..., M, D]: [..., N, M]."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel exp(-|x - y|^2 / (2 sigma^2)) between all rows of [..., N, D] and [..., M, D]: [..., N, M]."""
    squares_x, squares_y = x.square().sum(dim=-1), y.square().sum(dim=-1)
    distances = squares_x[..., :, None] + squares_y[..., None, :] - 2 * x @ y.mT
    return torch.exp(distances / (-2 * CMMD_SIGMA**2))


def _covariance_root(x: Tensor) -> Tensor:
    """An upper triangular R [min(N, D), D] with R^T R the covariance of `x` [N, D], by QR of a part of it at a time."""
    mean, root = x.mean(dim=0), x.new_empty(0, x.shape[1])
    for rows in x.split(max(ROWS, x.shape[1])):
        root = torch.linalg.qr(torch.cat([root, rows - mean]), mode="r").R
    return root / math.sqrt(len(x) - 1)


def _sums(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel matrix of `x` [N, D] and `y` [M, D] summed over its columns and over its rows: [N] and [M]."""
    over_y, over_x = [], y.new_zeros(len(y))
    for rows in x.split(ROWS):
        values = kernel(rows, y)
        over_y.append(values.sum(dim=1))
        over_x += values.sum(dim=0)
    return torch.cat(over_y), over_x


def _diagonal(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """The kernel of each row of `x` [N, D] and the same row of `y` [N, D]: [N]."""
    return kernel(x[:, None], y[:, None]).flatten()


def _jackknife_variance(left_out: Tensor) -> float:
    """Variance of a statistic from its values with each image left out (Efron 1979)."""
    return float((len(left_out) - 1) * (left_out - left_out.mean()).square().mean())
