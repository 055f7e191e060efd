"""The bytes of a quantized model, the share of its quantized weights, groups that are not whole, and the kernels."""

import math
from collections import Counter
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
    """The bytes of a model's parameters and buffers; biases and everything in high precision count as kept."""
    weights = quantized = 0
    for layer in module.modules():
        if isinstance(layer, (QuantLinear, QuantConv2d)):
            rows, *rest = layer.weight_shape
            weights += rows * math.prod(rest)
            parts = (layer.qweight, layer.scale, layer.scale_base, *map(layer.get_parameter, layer.part_names))
            quantized += sum(part.nbytes for part in parts if part is not None)
    total = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return Footprint(weights, quantized, total - quantized)


def remainder(layer: QuantLinear | QuantConv2d) -> str | None:
    """A note on groups of weights that do not divide a layer's input channels; None where they do."""
    spec = layer.weight_spec
    size, part = spec.granularity.size, "" if spec.split is None else " of one half"
    for columns in spec.segments(layer.weight_shape):
        if size and columns % size:
            divided = f"{columns} weights a channel{part} do not divide into groups of {size}"
            return f"{divided}; the last group has {columns % size}"
    return None


def kernels_used(module: nn.Module) -> dict[str, int]:
    """The number of quantized layers of `module` by kernel: the one that ran a layer last, or else would run it.

    A kernel that keeps weights wider than they are packed is named with "(speed)".
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (QuantLinear, QuantConv2d))]
    kept = [" (speed)" if (layer.kernel_weights_of or ("",))[-1] == "speed" else "" for layer in layers]
    return dict(Counter(f"{layer.kernel}{how}" for layer, how in zip(layers, kept, strict=True)))
