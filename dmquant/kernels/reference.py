"""The definition: decode, scale in float32, round, cast, multiply in the input's dtype; any device, any format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import fake_quantize
from dmquant.qtensor import dequantize


class Reference:
    """What every kernel offers, and what the others must give.

    A layer gives a kernel `quantize_input(x)`, `dequantize(dtype)`, `bias` and, of a convolution, its geometry; its
    packed codes are `qweight` and `scales`, by its `weight_spec` and `weight_shape`. A kernel that multiplies codes
    overrides `linear` or `conv2d` and calls these here for what it cannot take.
    """

    name = "reference"
    description = "decodes weights, rounds inputs, multiplies in the input's dtype; on any device"
    cost = 100
    """Of the kernels that can run a layer, the one of the least cost does."""
    MAKES_WEIGHTS = False
    """Whether `prepare` gives anything."""

    def missing(self) -> str | None:
        """What this machine lacks to run it, and after a colon how to get that; None where it lacks nothing."""
        return None

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        """Why it cannot run `layer` on `device`: capability, format, granularity, store, shape; None where it can."""
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        """Weights of its own, made from a layer's codes: by name, kept as `layer.kernel_<name>` and never saved."""
        return {}

    dequantize = staticmethod(dequantize)
    fake_quantize = staticmethod(fake_quantize)

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(..., in features) to (..., out features), in the dtype of `x`; `x` is transformed, but not quantized."""
        return F.linear(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(batch, in channels, height, width), batch or none, to the layer's output; as `linear`."""
        return layer._conv_forward(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)


KERNEL = Reference()
