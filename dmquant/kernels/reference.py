"""The definition: decode, scale in float32, round, cast; any device, any format."""

import torch
from torch import Tensor

from dmquant import activations, qtensor
from dmquant.activations import ActivationSpec
from dmquant.qtensor import WeightSpec


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight, (output channels, ...), in `dtype`, from packed codes and decoded float32 scales."""
    return qtensor.dequantize(codes, scale, spec, shape, dtype)


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None = None) -> Tensor:
    """A layer's input rounded to what `spec` can represent; `scale` for static specs."""
    return activations.fake_quantize(x, spec, dim, scale)
