"""One layer while its rounding is decided: it computes with soft or hard weights and quantizes its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.rounding import Grid, Rounding

COMPUTE: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: lambda layer, x, weight: F.linear(x, weight, layer.bias),
    nn.Conv2d: lambda layer, x, weight: layer._conv_forward(x, weight, layer.bias),
}
"""What a layer gives for an input with another weight."""


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
        """What the layer gives with the weights as they stand, its input quantized."""
        exact = x = self.quantized.transform_input(x)
        if self.quantized.activations is not None:
            quantized = self.quantized.quantize_input(x.detach())
            x = quantized + (x - x.detach())  # the value quantized, the gradient straight through
        weight = self.rounding() if self.values is None else self.values
        weight = self.quantized.complete(self.grid.as_weight(weight).to(x.dtype))
        return self.quantized.complete_output(COMPUTE[type(self.layer)](self.layer, x, weight), exact)
