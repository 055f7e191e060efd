"""The subspace that the gradients of a matrix are projected to, computed anew ever more seldom while it is stable."""

from collections import deque

import torch
from torch import Tensor

from dmquant.calib.tuning.eight_bit import Int4

QUEUE, GROWTH = 5, 2


class Subspace:
    """The first singular vectors of a gradient (rows, columns), on its smaller side, in 4 bits.

    Zhang et al., "Q-GaLore", arXiv 2407.08296, sections 3.2 and 3.3. Every `gap` steps it is computed of the gradient
    of that step; once the overlap |P_old^T P_new|^2 / r of old and new was `stable` on average over the last QUEUE
    times, the gap grows by the factor GROWTH. The overlap is 1 for the same subspace and r / d for a random one,
    whatever the signs and order of its vectors; published is the cosine of the first vectors with their signs, which an
    SVD is free to choose.
    """

    def __init__(self, rank: int, gap: int, stable: float):
        self.rank, self.gap, self.stable = rank, gap, stable
        self.since = 0
        """Steps since it was computed last."""
        self.basis: Int4 | None = None
        """Orthonormal columns but for their rounding, (smaller side, rank)."""
        self.overlaps: deque[float] = deque(maxlen=QUEUE)

    def update(self, gradient: Tensor) -> Tensor | None:
        """Look at the gradient of a step; where the basis is computed anew, P_new^T P_old (rank, rank), else None."""
        self.since += 1
        if self.basis is not None and self.since < self.gap:
            return None
        old, self.since = self.basis, 0
        new = leading(gradient, self.rank)
        self.basis = Int4.of(new)
        if old is None:
            return None
        turned = new.T @ old.decode()
        self.overlaps.append(float(turned.square().sum()) / new.shape[1])
        if len(self.overlaps) == QUEUE and sum(self.overlaps) / QUEUE >= self.stable:
            self.gap *= GROWTH
        return turned

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient in the basis, with the rank in place of its smaller side."""
        basis = self.basis.decode()
        return gradient @ basis if _is_tall(gradient.shape) else basis.T @ gradient

    def back(self, update: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An update in the basis as one of the matrix of this shape."""
        basis = self.basis.decode()
        return update @ basis.T if _is_tall(shape) else basis @ update


def leading(gradient: Tensor, rank: int) -> Tensor:
    """The first `rank` singular vectors of a matrix on its smaller side, as columns: of the Gram matrix, which takes a
    small part of the time and memory of an SVD."""
    gram = gradient.T @ gradient if _is_tall(gradient.shape) else gradient @ gradient.T
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).contiguous()


def _is_tall(shape: tuple[int, ...]) -> bool:
    return shape[0] >= shape[1]
