"""ModelOpt 0.47: inputs as its NVFP4QTensor rounds them (quantization/qtensor/nvfp4_tensor.py), and FP8 with one scale.

`input_scale` comes from calibration. Engines that read its files (TensorRT-LLM, vLLM, SGLang) have kernels of their
own, which differ in the last bit of a reciprocal.
"""

from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines.arithmetic import E2M1, E4M3, in_blocks
from dmquant.exchange.engines.engine import Engine, formats, weights_in

LEAST = 2.0**-9  # of the stored scale of a block


def _nvfp4(x: Tensor, base: Tensor) -> Tensor:
    def round_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
        scale = (E4M3.round((largest / (E2M1.max * base)).clamp(min=LEAST)) * base).unsqueeze(-1)
        return E2M1.round(blocks / scale).mul_(scale)

    return in_blocks(x, 16, round_blocks)


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    return E4M3.round(x.float() / scale) * scale


ENGINE = Engine(
    "modelopt",
    inputs=(
        (ActivationSpec.parse("nvfp4", scale="static:1"), _nvfp4),
        (ActivationSpec.parse("fp8", "tensor", scale="static:1"), _fp8),
    ),
    formats=formats(
        weights_in("nvfp4", "nvfp4", static=True),
        weights_in("nvfp4"),
        weights_in("fp8", "fp8", "tensor", static=True, granularity="tensor"),
    ),
)
