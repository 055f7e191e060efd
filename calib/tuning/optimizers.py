"""How one tensor follows its gradients: AdamW, or Q-GaLore with its low-rank gradients and 8-bit moments."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dmquant.calib.tuning.eight_bit import Int4, Moments
from dmquant.calib.tuning.subspace import Subspace

BETAS, EPS = (0.9, 0.999), 1e-8
SMALL = 4096  # elements: a tensor with fewer, or a vector, is left to AdamW in float32 (bitsandbytes' bound)


class Follower(Protocol):
    """The optimizer of one tensor, whose gradient may come in parts: one of every call of the backbone in a run."""

    gradient: Tensor | None
    """What is held of the gradient of the next step."""

    def take(self, gradient: Tensor) -> None:
        """Add a part of the gradient of the next step, of the tensor's shape, float32."""

    def step(self) -> Tensor:
        """What is to be subtracted from the tensor, for a rate of 1, of its shape, float32; the gradient is used up."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts that JSON can hold, which bring another of the same shape to the same point."""

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The inverse of `state`."""


class AdamW:
    """Loshchilov and Hutter, arXiv 1711.05101, without decay: what is learned starts where it is good."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.steps = 0
        self.first = torch.zeros(shape, device=device, dtype=torch.float32)
        self.second = torch.zeros_like(self.first)
        self.gradient: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def step(self) -> Tensor:
        gradient, self.gradient = self.gradient, None
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        return _direction(self.first, self.second, self.steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"first": self.first, "second": self.second}, {"steps": self.steps}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.first, self.second, self.steps = tensors["first"], tensors["second"], facts["steps"]


@dataclass(frozen=True)
class Lean:
    """Settings of Q-GaLore."""

    rank: float = 0.25
    """Share of the smaller side of a matrix."""
    gap: int = 200
    """Steps between two computations of a subspace, at first."""
    stable: float = 0.4
    """Overlap of subspaces from which on it doubles."""
    scale: float = 1.0
    """Factor of the update. Published is 0.25 with rates some four times those of Adam."""


class QGaLore:
    """Q-GaLore (arXiv 2407.08296) for a tensor (rows, ...), which is flattened to (rows, columns).

    Adam with 8-bit moments in a low-rank subspace of the gradients, of which only the part in it is held until the
    step. The subspace is that of the first part of a step's gradient, from the last call of a run. When the subspace
    turns by Q = P_new^T P_old, the first moment turns with it, and the second by Q's squares, as it would for
    independent components; published is to keep both as they are, in a basis that they do not belong to.
    """

    def __init__(self, shape: tuple[int, ...], options: Lean, device: torch.device):
        self.matrix = shape[0], math.prod(shape[1:])
        smaller = min(self.matrix)
        rank = max(1, round(options.rank * smaller))
        low = (self.matrix[0], rank) if self.matrix[0] >= self.matrix[1] else (rank, self.matrix[1])
        self.subspace, self.scale, self.steps = Subspace(rank, options.gap, options.stable), options.scale, 0
        self.first, self.second = Moments.zeros(low, True, device), Moments.zeros(low, False, device)
        self._shape, self._turned = shape, None
        self.gradient: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        matrix = gradient.reshape(self.matrix)
        if self.gradient is None:
            self._turned = self.subspace.update(matrix)
            self.gradient = self.subspace.project(matrix)
        else:
            self.gradient += self.subspace.project(matrix)

    def step(self) -> Tensor:
        low, turned, self.gradient = self.gradient, self._turned, None
        first, second = self.first.decode(), self.second.decode()
        if turned is not None:
            first, second = self._turn(turned, first), self._turn(turned.square(), second)
        self.steps += 1
        first.lerp_(low, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(low, low, value=1 - BETAS[1])
        update = _direction(first, second, self.steps)
        self.first.encode(first)
        self.second.encode(second)
        return self.subspace.back(update.mul_(self.scale), self.matrix).view(self._shape)

    def _turn(self, by: Tensor, moment: Tensor) -> Tensor:
        return moment @ by.T if self.matrix[0] >= self.matrix[1] else by @ moment

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        space = self.subspace
        tensors = {"first": self.first.codes, "first_largest": self.first.largest}
        tensors |= {"second": self.second.codes, "second_largest": self.second.largest}
        if space.basis is not None:
            tensors |= {"basis": space.basis.packed, "basis_low": space.basis.low, "basis_step": space.basis.step}
        facts = {"steps": self.steps, "gap": space.gap, "since": space.since, "overlaps": list(space.overlaps)}
        return tensors, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        space, self.steps = self.subspace, facts["steps"]
        self.first = Moments(tensors["first"], tensors["first_largest"], True)
        self.second = Moments(tensors["second"], tensors["second_largest"], False)
        space.gap, space.since = facts["gap"], facts["since"]
        space.overlaps = deque(facts["overlaps"], maxlen=space.overlaps.maxlen)
        if "basis" in tensors:
            shape = min(self.matrix), space.rank
            space.basis = Int4(tensors["basis"], tensors["basis_low"], tensors["basis_step"], shape)


def follower(shape: tuple[int, ...], lean: Lean | None, device: torch.device) -> Follower:
    """Q-GaLore for a matrix, or a convolution's weight, that is not SMALL, where `lean` is given; else AdamW."""
    return QGaLore(shape, lean, device) if is_lean(shape, lean) else AdamW(shape, device)


def is_lean(shape: tuple[int, ...], lean: Lean | None) -> bool:
    """Whether Q-GaLore is for a tensor of this shape."""
    return lean is not None and len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > 1 and math.prod(shape) >= SMALL


def _direction(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Adam's step for a rate of 1, from its moments after so many steps."""
    root = (second / (1 - BETAS[1] ** steps)).sqrt_().add_(EPS)
    return first / (1 - BETAS[0] ** steps) / root
