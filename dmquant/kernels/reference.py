"""The definition: decode, scale in float32, round, cast, multiply in the input's dtype; any device, any format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import fake_quantize
from dmquant.qtensor import dequantize


class Reference:
    """The interface of kernels, and the results that every other kernel must give.

    A layer gives a kernel `quantize_input(x)`, `dequantize(dtype)`, `bias` and, of a convolution, its geometry; its
    packed codes are `qweight` and `scales`, by its `weight_spec` and `weight_shape`. A kernel that multiplies codes
    overrides `linear` or `conv2d` and calls these here for what it cannot take.
    """

    name = "reference"
    description = "decodes weights, rounds inputs, multiplies in the input's dtype; on any device"
    cost = 100
    """A layer is run by the kernel of the least cost among those that can."""
    MAKES_WEIGHTS = False
    """Whether `prepare` returns any weights."""

    def missing(self) -> str | None:
        """A requirement this machine lacks, and after a colon how to get it; None where it lacks nothing."""
        return None

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        """Why it cannot run `layer` on `device`: capability, format, granularity, store, shape; None where it can."""
        return None

    def prepare(self, layer: nn.Module) -> dict[str, Tensor]:
        """The kernel's own weights, of any shape and dtype, by name; kept as `layer.kernel_<name>` and never saved."""
        return {}

    dequantize = staticmethod(dequantize)
    fake_quantize = staticmethod(fake_quantize)

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The product (..., out), in the dtype of `x` (..., in), which is transformed but not quantized."""
        return F.linear(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The convolution of `x` (batch, in, height, width), or without a batch; dtype as `linear`."""
        return layer._conv_forward(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)


KERNEL = Reference()
