"""One layer while its rounding is decided: it computes with soft or hard weights and quantizes its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.kernels import reference
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.rounding import Grid, Rounding

PRODUCTS: dict[type, Callable[[Tensor, Any], Tensor]] = {
    nn.Linear: reference.KERNEL.linear,
    nn.Conv2d: reference.KERNEL.conv2d,
}
"""Of the kernels the one that needs no codes: what is learned has none yet."""


@dataclass
class Learner:
    """One layer while its rounding is learned."""

    name: str
    layer: nn.Linear | nn.Conv2d
    grid: Grid
    rounding: Rounding
    quantized: QuantLinear | QuantConv2d
    """The layer that it becomes; until then it quantizes the inputs."""
    values: Tensor | None = None
    """Weights to compute with; None for those of the rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives with the weights as they stand, its input quantized; in the dtype of `x`."""
        x = self.quantized.transform_input(x)
        return self.quantized.complete_output(PRODUCTS[type(self.layer)](x, self), x)

    # What kernels ask of a layer

    @property
    def bias(self) -> Tensor | None:
        """The float layer's own."""
        return self.layer.bias

    def quantize_input(self, x: Tensor) -> Tensor:
        """A transformed input as the weight meets it: its value quantized, its gradient straight through."""
        if self.quantized.activations is None:
            return x
        quantized = self.quantized.quantize_input(x.detach())
        return quantized + (x - x.detach())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with, soft or hard, in `dtype` and the layer's shape."""
        weight = self.rounding() if self.values is None else self.values
        return self.quantized.complete(self.grid.as_weight(weight).to(dtype))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.layer._conv_forward(x, weight, bias)
