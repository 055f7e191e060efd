"""The definition: decode, scale in float32, round, cast, multiply in the input's dtype; any device, any format."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant import activations, qtensor
from dmquant.activations import ActivationSpec
from dmquant.qtensor import WeightSpec


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight, (output channels, ...), in `dtype`, from packed codes and decoded float32 scales."""
    return qtensor.dequantize(codes, scale, spec, shape, dtype)


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None = None) -> Tensor:
    """A layer's input rounded to what `spec` can represent; `scale` for static specs."""
    return activations.fake_quantize(x, spec, dim, scale)


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

    def dequantize(
        self, codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """The weight in `dtype` from packed codes (rows, bytes) and decoded float32 scales."""
        return dequantize(codes, scale, spec, shape, dtype)

    def fake_quantize(self, x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None = None) -> Tensor:
        """A layer's input, channels along `dim`, rounded to what `spec` can represent; same dtype and shape."""
        return fake_quantize(x, spec, dim, scale)

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(..., in features) to (..., out features), in the dtype of `x`; `x` is transformed, but not quantized."""
        return F.linear(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(batch, in channels, height, width), batch or none, to the layer's output; as `linear`."""
        return layer._conv_forward(layer.quantize_input(x), layer.dequantize(x.dtype), layer.bias)


KERNEL = Reference()
