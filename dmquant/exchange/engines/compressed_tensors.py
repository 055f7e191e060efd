"""compressed-tensors 0.20: inputs as its own layers round them, in the input's dtype (quantization/lifecycle).

vLLM, which reads its files, has kernels of its own, which differ in the last bit of a reciprocal.
"""

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines.arithmetic import E2M1, E4M3, in_blocks, of_tokens
from dmquant.exchange.engines.engine import Engine, formats, weights_in

ZERO = 0.125  # the stored scale of a block whose own would be zero


def _nvfp4(x: Tensor, base: Tensor) -> Tensor:
    """The file holds the reciprocal of the base."""
    inverse = 1 / base

    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        stored = E4M3.round(inverse * (largest.to(x.dtype) / E2M1.max).float())
        scale = (torch.where(stored == 0, ZERO, stored) / inverse).unsqueeze(-1)
        return E2M1.round(blocks / scale).mul_(scale)

    return in_blocks(x, 16, round_blocks)


def _scale(x: Tensor, largest: float) -> Tensor:
    scale = of_tokens(x) / largest
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)


def _fp8(x: Tensor, scale: None) -> Tensor:
    scale = _scale(x, E4M3.max)
    return (E4M3.round(x / scale) * scale).float()


def _int8(x: Tensor, scale: None) -> Tensor:
    scale = _scale(x, 127.5)
    return ((x / scale).clamp(-128, 127).round() * scale).float()


ENGINE = Engine(
    "compressed-tensors",
    inputs=(
        (ActivationSpec.parse("nvfp4", scale="static:1"), _nvfp4),
        (ActivationSpec.parse("fp8", "token"), _fp8),
        (ActivationSpec.parse("int8", "token"), _int8),
    ),
    formats=formats(
        weights_in("nvfp4", "nvfp4", static=True),
        weights_in("nvfp4"),
        weights_in("mxfp4"),
        weights_in("fp8", "fp8"),
        weights_in("int8", "int8"),
    ),
)
