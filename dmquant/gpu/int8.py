"""Integer tensor cores: int8 codes of inputs times int8 weights, exact sums in int32, scales afterwards."""

import functools

import torch
from torch import Tensor, nn

from dmquant.formats import get_format
from dmquant.gpu import device as devices
from dmquant.gpu.ops import finish
from dmquant.gpu.product import Product


def product(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product (m, n) of int8 operands (m, k) and (n, k)."""
    return torch._int_mm(a, b.t())


@functools.cache
def _fails(device: torch.device) -> str | None:
    operands = devices.worst_operands(get_format("int8"), torch.int8, 0, device)
    try:
        return None if devices.exact(product, operands, operands) else "int8 products on this GPU are not exact"
    except RuntimeError as error:
        return f"int8 products fail on this GPU: {str(error).splitlines()[0]}"


class Int8(Product):
    """One int8 product a layer. Every device that runs it gives the same sums, those of exact arithmetic."""

    name, cost = "cuda-int8", 20
    description = "integer tensor cores: int8 codes, exact sums, scales afterwards"
    dtype, capability, unit_name = torch.int8, (7, 5), "integer tensor cores"
    MULTIPLE = 8

    def fails(self, layer: nn.Module, device: torch.device) -> str | None:
        return _fails(device)

    def multiply(self, codes: Tensor, token: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        return finish(product(codes, self.weight(layer)), token, layer.kernel_channel, layer.bias, dtype)


KERNEL = Int8()
