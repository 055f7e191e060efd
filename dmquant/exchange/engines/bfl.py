"""diffusers' own `bfl` layers: NVFP4 by FlashInfer with a static `input_scale`, FP8 with a scale for each token.

BFLNVFP4Linear and BFLFP8RLinear of diffusers/quantizers/bfl/utils.py. Where there is no such GPU, or no FlashInfer,
they round no inputs at all.
"""

from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines import arithmetic
from dmquant.exchange.engines.arithmetic import E4M3
from dmquant.exchange.engines.engine import Engine, formats, weights_in


def _nvfp4(x: Tensor, base: Tensor) -> Tensor:
    return arithmetic.nvfp4_by_reciprocals(x, base)


def _fp8(x: Tensor, scale: None) -> Tensor:
    scale = (arithmetic.of_tokens(x.float()) / E4M3.max).clamp(min=1e-12)
    return E4M3.round(x.float() / scale) * scale


ENGINE = Engine(
    "bfl",
    inputs=(
        (ActivationSpec.parse("nvfp4", scale="static:1"), _nvfp4),
        (ActivationSpec.parse("fp8", "token"), _fp8),
    ),
    formats=formats(weights_in("nvfp4", "nvfp4", static=True), weights_in("fp8", "fp8")),
)
