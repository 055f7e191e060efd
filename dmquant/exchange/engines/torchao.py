"""torchao 0.18: inputs as its tensors round them on the way to a product, in torch's own operations.

NVFP4Tensor and MXTensor of prototype/mx_formats (the latter with ScaleCalculationMode.RCEIL, the configuration's
default), Float8Tensor and Int8Tensor of quantization/quantize_. On some GPUs MSLK's kernels take their place.
"""

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines import arithmetic
from dmquant.exchange.engines.arithmetic import E2M1, E4M3
from dmquant.exchange.engines.engine import Engine, formats, weights_in

LEAST = 2.0**-6  # of the stored scale of a block: the smallest normal E4M3
LEAST_INT8 = torch.finfo(torch.float32).eps


def _nvfp4(x: Tensor, base: Tensor | None) -> Tensor:
    """Values are multiplied by a rounded reciprocal."""
    base = arithmetic.base_of(x.float()) if base is None else base

    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        stored = E4M3.round((largest / E2M1.max / base).clamp(min=LEAST))
        inverse = (1 / base) / stored
        return E2M1.round(blocks * inverse.unsqueeze(-1)).mul_((base * stored).unsqueeze(-1))

    return arithmetic.in_blocks(x, 16, round_blocks)


def _mxfp8(x: Tensor, scale: None) -> Tensor:
    return arithmetic.mx(x, E4M3)


def _mxfp4(x: Tensor, scale: None) -> Tensor:
    return arithmetic.mx(x, E2M1)


def _fp8(x: Tensor, scale: None) -> Tensor:
    """The scale is rounded to the input's dtype. A token of zeros stays zero; there, without a lower bound of the
    activation's value in the configuration, it becomes NaN."""
    scale = arithmetic.positive((arithmetic.of_tokens(x) / E4M3.max).float())
    return E4M3.round(x.float() / scale) * scale


def _int8(x: Tensor, scale: None) -> Tensor:
    """The scale is that of 127.5, rounded to the input's dtype; values are multiplied by its reciprocal."""
    scale = (arithmetic.of_tokens(x) / 127.5).clamp(min=LEAST_INT8).float()
    return (x * (1 / scale)).round().clamp(-128, 127) * scale


ENGINE = Engine(
    "torchao",
    inputs=(
        (ActivationSpec.parse("nvfp4"), _nvfp4),
        (ActivationSpec.parse("nvfp4", scale="static:1"), _nvfp4),
        (ActivationSpec.parse("mxfp8"), _mxfp8),
        (ActivationSpec.parse("mxfp4"), _mxfp4),
        (ActivationSpec.parse("fp8", "token"), _fp8),
        (ActivationSpec.parse("int8", "token"), _int8),
    ),
    formats=formats(
        weights_in("nvfp4", "nvfp4"),
        weights_in("nvfp4"),
        weights_in("mxfp8", "mxfp8"),
        weights_in("mxfp4", "mxfp4"),
        weights_in("fp8", "fp8"),
        weights_in("fp8"),
        weights_in("int8", "int8"),
        weights_in("int8"),
    ),
)
