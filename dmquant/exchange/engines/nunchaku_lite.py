"""Nunchaku's W4A4 kernels, as diffusers' nunchaku_lite layers call them: smoothing, a low-rank branch, and groups.

INT4 has one scale in the input's dtype for every 64 channels, NVFP4 one E4M3 for every 16, relative to nothing. The
kernels are CUDA alone (quantize_w4a4_act_fuse_lora), so that this is their arithmetic as described, not as run.
"""

import torch
from torch import Tensor

from dmquant.activations import ActivationSpec
from dmquant.exchange.engines.arithmetic import INT4_GROUPS, int4, nvfp4
from dmquant.exchange.engines.engine import Engine, formats, weights_in


def _nvfp4(x: Tensor, scale: None) -> Tensor:
    return nvfp4(x, torch.ones((), device=x.device, dtype=torch.float32), least=0.0)


ENGINE = Engine(
    "nunchaku-lite",
    inputs=((ActivationSpec.parse("int4", INT4_GROUPS), int4), (ActivationSpec.parse("nvfp4"), _nvfp4)),
    formats=formats(
        weights_in("int4", "int4", INT4_GROUPS, granularity=INT4_GROUPS, store="bf16", scale="lean"),
        weights_in("nvfp4", "nvfp4"),
    ),
)
