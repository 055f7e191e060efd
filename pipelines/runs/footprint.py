"""What a model takes, and how much of that is its quantized weights."""

import math
from dataclasses import dataclass

from torch import nn

from dmquant.layers import QuantConv2d, QuantLinear


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parameters and buffers, and bits per quantized weight with all its scales."""

    quantized_weights: int
    quantized_bytes: int
    kept_bytes: int

    @property
    def bytes(self) -> int:
        return self.quantized_bytes + self.kept_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Codes, scales and what transforms store over the weights; None where nothing is quantized."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None


def footprint(module: nn.Module) -> Footprint:
    """What a model's parameters and buffers take; biases and everything in high precision count as kept."""
    weights = quantized = 0
    for layer in module.modules():
        if isinstance(layer, (QuantLinear, QuantConv2d)):
            rows, *rest = layer.weight_shape
            weights += rows * math.prod(rest)
            parts = (layer.qweight, layer.scale, layer.scale_base, *map(layer.get_parameter, layer.part_names))
            quantized += sum(part.nbytes for part in parts if part is not None)
    total = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return Footprint(weights, quantized, total - quantized)
