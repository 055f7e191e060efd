"""AdaRound on any grid: learn for every weight whether it goes to the value below or above it.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568, with the step of a
floating-point grid, which differs from weight to weight; and its scale-aware variant, FP4DiT, arXiv 2503.15465, eq. 8.
"""

import importlib
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dmquant.grids import Grid
from dmquant.rounding.base import Box, Rounding

LEARNS = True
NEEDS_MOMENTS = False
ZETA, GAMMA = 1.1, -0.1  # the stretch of the sigmoid, arXiv 2004.10568, eq. 23
GATE = ZETA - GAMMA, GAMMA
FASTER = "dmquant.cpu.learning"  # the same in one pass on a CPU; by name alone, since it stands above


class Options(BaseModel, extra="forbid"):
    """Options of AdaRound in a recipe."""

    scale_aware: bool = False
    """Learn V' = V * step instead of V. Under Adam that is a learning rate divided by each weight's own step."""
    regularizer: float = Field(default=5000.0, ge=0)
    """Weight of the penalty, a mean over all weights of the unit, against a loss that is 1 at nearest rounding."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps without penalty."""
    beta: tuple[float, float] = (20.0, 2.0)
    """The penalty's exponent after the warm-up and at the end; linear in between."""


class _SoftWeights(torch.autograd.Function):
    """`AdaRound.forward` by compiled code, which keeps nothing for the gradient but what there is already."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor | None, lower: Tensor, upper: Tensor, compiled: Any) -> Tensor:
        ctx.save_for_backward(v, step, lower, upper)
        ctx.compiled = compiled
        return compiled.soft_weights(v, step, lower, upper, GATE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.compiled.soft_gradient(*ctx.saved_tensors, GATE, gradient), None, None, None, None


class Gated(Rounding):
    """W~ = lower + h(V) (upper - lower), with h a sigmoid stretched beyond 0 and 1 and clipped to them.

    `v`, of which V is a multiple where `step` is not None, is a parameter or made of parameters; (rows, columns).
    """

    def __init__(self, grid: Grid, options: BaseModel):
        """`options` has AdaRound's `regularizer`, `warmup` and `beta`."""
        super().__init__(grid)
        self.options = options
        lower, upper, fraction = Box.around(grid)
        self.register_buffer("lower", lower.contiguous())
        self.register_buffer("upper", upper.contiguous())
        self.register_buffer("step", None)
        # h(v) = fraction. A weight with nowhere to go keeps its value whatever h says: it starts decided.
        fraction = torch.where(upper > lower, fraction, -1)
        self.begin(torch.logit(((fraction - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)))

    def begin(self, v: Tensor) -> None:
        """Make the parameters, with which V is `v`, (rows, columns) float32, in the beginning."""
        raise NotImplementedError

    def gate(self) -> Tensor:
        """h(V), (rows, columns) float32, from 0 (the lower value) to 1 (the upper one): arXiv 2004.10568, eq. 23."""
        v = self.v if self.step is None else self.v / self.step
        return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        return torch.lerp(self.lower, self.upper, self.gate())

    def penalty(self, progress: float) -> Tensor | None:
        """regularizer * sum(1 - |2 h - 1|^beta), a scalar: arXiv 2004.10568, eq. 24; None during the warm-up."""
        if progress < self.options.warmup:
            return None
        return self.options.regularizer * (1 - (2 * self.gate() - 1).abs().pow(self._beta(progress))).sum()

    def _beta(self, progress: float) -> float:
        (first, last), warmup = self.options.beta, self.options.warmup
        return first + (last - first) * (progress - warmup) / (1 - warmup)

    def hard(self) -> Tensor:
        return torch.where(self.v >= 0, self.upper, self.lower)

    def undecided(self) -> int:
        gate = self.gate()
        return int(((gate > 0) & (gate < 1)).sum())


class AdaRound(Gated):
    """V learned for each weight."""

    asked_on: torch.device | None = None
    is_taken = False

    def begin(self, v: Tensor) -> None:
        if self.options.scale_aware:
            self.step = self.grid.step
        self.v = nn.Parameter(v if self.step is None else v * self.step)

    def forward(self) -> Tensor:
        if compiled := self._compiled():
            return _SoftWeights.apply(self.v, self.step, self.lower, self.upper, compiled)
        return super().forward()

    def add_penalty_gradient_(self, progress: float, share: float) -> None:
        if progress < self.options.warmup:
            return
        if not (compiled := self._compiled()):
            super().add_penalty_gradient_(progress, share)
            return
        if self.v.grad is None:
            self.v.grad = torch.zeros_like(self.v)
        factor = self.options.regularizer * share
        compiled.add_penalty_gradient_(self.v.grad, self.v, self.step, GATE, self._beta(progress), factor)

    def _compiled(self) -> Any:
        """The module of compiled code, where that takes these weights; asked once a device."""
        if torch.compiler.is_compiling():
            return None
        compiled = importlib.import_module(FASTER)
        if self.asked_on != self.v.device:
            self.asked_on, self.is_taken = self.v.device, compiled.takes(self.v, self.step, self.lower, self.upper)
        return compiled if self.is_taken else None


start = AdaRound
"""Soft weights equal to the float weights (clipped to the grid), or to what a solution wanted, to float32 precision."""
