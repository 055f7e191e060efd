"""FP8 tensor cores: operands that are exact in E4M3, scaled in the product itself.

Never with fast accumulation: Hopper's tensor cores add in fewer bits than float32 has, and without it partial sums are
moved to float32 registers in time. Whether that suffices for exact sums is tried on the device.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.formats import get_format
from dmquant.gpu import device as devices
from dmquant.gpu import int8, operands
from dmquant.gpu.operands import E4M3
from dmquant.gpu.ops import finish
from dmquant.gpu.product import Product


def product(a: Tensor, b: Tensor, fast: bool = False) -> Tensor:
    """The float32 product (m, n) of E4M3 operands (m, k) and (n, k)."""
    one = torch.ones((), device=a.device, dtype=torch.float32)
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)


def scaled_product(a: Tensor, b: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None) -> Tensor:
    """The bfloat16 product (m, n) of E4M3 operands (m, k) and (n, k), scales (m,) and (n,), bias (n,) bfloat16."""
    scales = token.unsqueeze(1), channel.unsqueeze(0)
    return torch._scaled_mm(a, b.t(), *scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False)


@functools.cache
def _fails(device: torch.device) -> str | None:
    """Why there is no FP8 product on this device; None where there is."""
    try:
        a = devices.worst_operands(get_format("fp4"), E4M3, 0, device)
        ones = torch.ones(len(a), device=device, dtype=torch.float32)
        scaled_product(a, a, ones, ones, ones.bfloat16())
        product(a, a)
    except (RuntimeError, ValueError) as error:
        return f"FP8 products fail on this GPU: {str(error).splitlines()[0]}"
    return None


@functools.cache
def sums_are_exact(inputs: str, weights: str, octaves: int, device: torch.device) -> bool:
    """Whether sums of products of these formats, weights times up to 2^octaves, are exact on the device.

    Of 4,608 products, or as many as float32 has room for; by both products, which may be those of different libraries.
    """
    fmts = get_format(inputs), get_format(weights)
    room = operands.EXACT_SUMS // math.ceil(operands.largest(fmts[0]) * operands.largest(fmts[1]) * 2**octaves)
    depth = min(devices.DEPTH, room // Fp8.MULTIPLE * Fp8.MULTIPLE)
    a, b = (devices.worst_operands(fmt, E4M3, up, device, depth) for fmt, up in zip(fmts, (0, octaves), strict=True))
    token, channel = (torch.ones(len(x), device=device, dtype=torch.float32) for x in (a, b))
    rounded = (a.double() @ b.double().T).bfloat16()
    return devices.exact(product, a, b) and torch.equal(scaled_product(a, b, token, channel, None), rounded)


class Fp8(Product):
    """One FP8 product a layer. It leaves to integers what is exact in them, unless its sums are exact as well here."""

    name, cost = "cuda-fp8", 10
    description = "FP8 tensor cores: operands that are exact in E4M3, scales in the product"
    dtype, capability, unit_name = E4M3, (8, 9), "FP8 tensor cores"
    MULTIPLE = 16

    def fails(self, layer: nn.Module, device: torch.device) -> str | None:
        if reason := _fails(device):
            return reason
        spec, inputs = layer.weight_spec, layer.activations
        if int8.KERNEL.refuses_codes(layer):
            return None
        most = operands.operand(layer, E4M3).most
        sums = math.prod(layer.weight_shape[1:]) * operands.largest(inputs.fmt) * operands.largest(spec.fmt) * most
        if sums > operands.EXACT_SUMS:
            return f"sums up to {sums:,.0f} are not exact in float32, and are in int32: cuda-int8"
        if not sums_are_exact(inputs.fmt.name, spec.fmt.name, most.bit_length() - 1, device):
            return "FP8 sums are not exact on this GPU, by trial, and those of integers are: cuda-int8"
        return None

    def multiply(self, codes: Tensor, token: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        weight, channel, bias = self.weight(layer), layer.kernel_channel, layer.bias
        if dtype != torch.bfloat16:  # row by row, scales are for bfloat16 results
            return finish(product(codes, weight), token, channel, bias, dtype)
        more = len(weight) - len(channel)
        bias = None if bias is None else _longer(bias.detach().bfloat16(), more)
        scales = _longer(token, len(codes) - len(token)), _longer(channel, more)
        return scaled_product(codes, weight, *scales, bias)[: len(token), : len(channel)]


def _longer(x: Tensor, more: int) -> Tensor:
    """`x` (n,) with `more` zeros after it; itself without, where `F.pad` would copy it."""
    return F.pad(x, (0, more)) if more else x


KERNEL = Fp8()
