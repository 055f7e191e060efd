"""CPU: products in floating point, of weights that compiled code expands and inputs that a compiled loop rounds.

float32 inputs give the reference's result bit for bit. bfloat16 and float16 ones are quantized and multiplied in
float32 where this machine is faster in it, and the output is rounded once to their dtype: nearer to exact numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.cpu import expanding, lookup
from dmquant.cpu.fast_dtype import fast_dtype
from dmquant.kernels.reference import Reference


class Cpu(Reference):
    """The reference's product in the dtype that the CPU is fast in."""

    name, cost = "cpu", 50
    description = "expands weights and rounds inputs in compiled code, multiplies in the dtype that is fast here"
    dequantize = staticmethod(expanding.dequantize)
    fake_quantize = staticmethod(lookup.fake_quantize)

    def refuses(self, layer: nn.Module, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"it runs on the CPU, not on {device}"

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        return _in(x, F.linear(*_operands(x, layer)))

    def conv2d(self, x: Tensor, layer: nn.Module) -> Tensor:
        return _in(x, layer._conv_forward(*_operands(x, layer)))


def _dtype_of(x: Tensor) -> torch.dtype:
    return x.dtype if torch.is_autocast_enabled("cpu") else fast_dtype(x.dtype)  # autocast decides for itself


def _operands(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """The quantized input, the weight and the bias, all of the dtype to multiply in."""
    dtype, bias = _dtype_of(x), layer.bias
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    # Autograd keeps a weight until the backward pass.
    weight = layer.dequantize(dtype) if learns else expanding.passing_weight(layer, dtype)
    return layer.quantize_input(x.to(dtype)), weight, bias if bias is None else bias.to(dtype)


def _in(x: Tensor, product: Tensor) -> Tensor:
    """The product in the dtype of the input, or in autocast's."""
    return product if _dtype_of(x) == x.dtype else product.to(x.dtype)


KERNEL = Cpu()
