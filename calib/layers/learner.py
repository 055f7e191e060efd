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


class _StraightThrough(torch.autograd.Function):
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
    values: Tensor | None = None
    """Weights to compute with, float32 in matrix form (rows, columns); None for the weights of the rounding."""

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
            return self.quantized.quantize_input(x.detach()) + (x - x.detach())
        return _StraightThrough.apply(x, self.quantized.quantize_input)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with, soft or hard, in `dtype` and the layer's shape, (out, in, ...)."""
        weight = self.rounding() if self.values is None else self.values
        return self.quantized.complete(self.grid.as_weight(weight).to(dtype))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.layer._conv_forward(x, weight, bias)
