"""A layer while its rounding is decided: it computes with soft or hard weights and quantizes its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.kernels import reference
from dmquant.layers import QUANTIZED, QuantConv2d, QuantLinear
from dmquant.rounding import Grid, Rounding

PRODUCTS: dict[type, Callable[[Tensor, Any], Tensor]] = {
    nn.Linear: reference.KERNEL.linear,
    nn.Conv2d: reference.KERNEL.conv2d,
}
PRODUCTS |= {QUANTIZED[kind]: product for kind, product in PRODUCTS.items()}
"""The reference kernel's products: the one kernel that needs no codes, which a layer that learns does not have yet."""


class StraightThrough(torch.autograd.Function):
    """A function of a tensor, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class Learner:
    """A layer while its rounding is learned."""

    name: str
    layer: nn.Linear | nn.Conv2d
    """In full precision, or already quantized where what was decided is learned on."""
    grid: Grid
    rounding: Rounding
    quantized: QuantLinear | QuantConv2d
    """The layer that takes its place; until then it quantizes the inputs."""
    held: bool = False
    """Whether it stays soft while others are decided: it learns with them, and goes on in the next window."""
    goes_on: bool = False
    """Whether it learnt before, in the window before this one."""
    values: Tensor | None = None
    """Weights to compute with, float32 in matrix form (rows, columns); None for the weights of the rounding."""
    dropped: float = 0.0
    """Share of the input's elements that are not quantized where `drawing` draws them: arXiv 2203.05740, section 4."""
    drawing: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer, (rows, ..., out) or (rows, out, height, width), in the dtype of `x`.

        The input `x`, (rows, ..., in) or (rows, in, height, width), is transformed and quantized; the weight is
        `dequantize`'s.
        """
        *given, x = self.quantized.inputs(x)
        return self.quantized.complete_output(PRODUCTS[type(self.layer)](x, self), given)

    # The interface of a layer towards kernels

    @property
    def bias(self) -> Tensor | None:
        """The bias of the float layer, (out,) in its dtype, or None."""
        return self.layer.bias

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantize a transformed input, with a straight-through gradient; same shape and dtype."""
        if self.quantized.activations is None:
            return x
        if torch.compiler.is_compiling():
            return self._quantized(x.detach()) + (x - x.detach())
        return StraightThrough.apply(x, self._quantized)

    def _quantized(self, x: Tensor) -> Tensor:
        quantized = self.quantized.quantize_input(x)
        if not self.dropped or self.drawing is None:
            return quantized
        kept = torch.rand(x.shape, generator=self.drawing, dtype=torch.float32).to(x.device) < self.dropped
        return torch.where(kept, x, quantized)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with, soft or hard, in `dtype` and the layer's shape, (out, in, ...)."""
        weight = self.rounding() if self.values is None else self.values
        return self.quantized.complete(self.grid.as_weight(weight).to(dtype))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.device.type == "cpu":  # the order in which products of wide convolutions take less time back
            weight = weight.contiguous(memory_format=torch.channels_last)
        return self.layer._conv_forward(x, weight, bias)
