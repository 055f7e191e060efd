"""ComfyUI: inputs as comfy-kitchen 0.2.40 rounds them in its eager backend (backends/eager/quantization.py).

ComfyUI gives its layouts tokens in two dimensions, all of a call together, and the layer's `input_scale` where the
file has one (comfy/ops.py). Without one NVFP4's base comes from the call, and FP8 has the scale 1, so that here it is
static.
"""

from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines import arithmetic
from dmquant.exchange.engines.arithmetic import E4M3, INT4_GROUPS
from dmquant.exchange.engines.engine import Engine, formats, weights_in

BRANCH = [{"method": "lowrank", "rank": 32, "by": "output"}]
ROTATED = [{"method": "rotate", "size": 256, "order": "regular"}]


def _nvfp4(x: Tensor, base: Tensor | None) -> Tensor:
    return arithmetic.nvfp4(x, arithmetic.base_of(x) if base is None else base, least=0.0)


def _mxfp8(x: Tensor, scale: None) -> Tensor:
    return arithmetic.mx(x, E4M3)


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Reciprocal and product are rounded to the input's dtype."""
    return E4M3.round((x * (1 / scale).to(x.dtype)).float()) * scale


def _int8(x: Tensor, scale: None) -> Tensor:
    """The quotient is rounded to the input's dtype first, then to integers."""
    scale = (arithmetic.of_tokens(x).float() / 127).clamp(min=1e-30)
    return (x / arithmetic.positive(scale.to(x.dtype))).round().clamp(-128, 127).float() * scale


ENGINE = Engine(
    "comfyui",
    inputs=(
        (ActivationSpec.parse("nvfp4", scale="static:1"), _nvfp4),
        (ActivationSpec.parse("nvfp4"), _nvfp4),
        (ActivationSpec.parse("mxfp8"), _mxfp8),
        (ActivationSpec.parse("fp8", "tensor", scale="static:1"), _fp8),
        (ActivationSpec.parse("int8", "token"), _int8),
        (ActivationSpec.parse("int4", INT4_GROUPS), arithmetic.int4),
    ),
    formats=formats(
        weights_in("nvfp4", "nvfp4", static=True),
        weights_in("nvfp4"),
        weights_in("mxfp8", "mxfp8"),
        weights_in("fp8", "fp8", "tensor", static=True, granularity="tensor"),
        weights_in("fp8", granularity="tensor"),
        weights_in("int8", "int8"),
        weights_in("lut4_gaussian", "int8", granularity="group:16", store="levels", scale="lean", transforms=ROTATED),
        weights_in("int4", "int4", INT4_GROUPS, granularity=INT4_GROUPS, store="bf16", scale="lean", transforms=BRANCH),
    ),
)
