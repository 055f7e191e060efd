"""Integer tensor cores: int8 codes of inputs times int8 weights, exact sums in int32, scales afterwards.

Two ways with the same sums: cuBLAS' product, whose sums go to memory and back for the scales, and Triton's, which keeps
them. Which is faster depends on the GPU and the shape: each shape is timed once.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmquant.formats import get_format
from dmquant.gpu import device as devices
from dmquant.gpu.ops import finish, has_triton, on_device_of, operator
from dmquant.gpu.product import Product

_TRITONS = (8, 0)  # the capability from which Triton multiplies integers on tensor cores
_fastest: dict[tuple, int] = {}


def product(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product (m, n) of int8 operands (m, k) and (n, k)."""
    return torch._int_mm(a, b.t())


@functools.cache
def _fails(device: torch.device) -> str | None:
    operands = devices.worst_operands(get_format("int8"), torch.int8, 0, device)
    try:
        return None if devices.exact(product, operands, operands) else "int8 products on this GPU are not exact"
    except (RuntimeError, ValueError) as error:
        return f"int8 products fail on this GPU: {str(error).splitlines()[0]}"


@operator
def integer_product(
    codes: Tensor, weight: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product (m, n) in `dtype` of int8 operands (at least m, k), (at least n, k), with scales (m,), (n,), bias."""
    with on_device_of(codes):
        way = _way(codes, weight, token, channel, bias, dtype)
        return _ways(codes, weight, token, channel, bias, dtype)[way]()


@integer_product.register_fake
def _(codes, weight, token, channel, bias, dtype):
    return codes.new_empty(len(token), len(channel), dtype=dtype)


def _ways(
    codes: Tensor, weight: Tensor, token: Tensor, channel: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> list[Callable[[], Tensor]]:
    """cuBLAS' way, and after it Triton's, one for each of its tiles."""
    calls = [lambda: finish(product(codes, weight), token, channel, bias, dtype)]
    if codes.is_cuda and has_triton() and torch.cuda.get_device_capability(codes.device) >= _TRITONS:
        from dmquant.gpu.fused import integers

        def tiled(way: int) -> Tensor:
            out = torch.empty(len(token), len(channel), dtype=dtype, device=codes.device)
            integers.multiply(codes, weight, token, channel, bias, out, way)
            return out

        calls += [functools.partial(tiled, way) for way in range(len(integers.TILES))]
    return calls


def _way(codes: Tensor, weight: Tensor, *others: Tensor | torch.dtype | None) -> int:
    """The fastest way for operands like these, timed at their first call; cuBLAS' while a graph is captured."""
    key = codes.device, len(codes).bit_length(), *weight.shape, others[-1], others[-2] is None
    if key not in _fastest and codes.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return 0
        _fastest[key] = fastest(_ways(codes, weight, *others), devices.seconds)
    return _fastest.get(key, 0)


def fastest(calls: list[Callable[[], Tensor]], seconds: Callable[[Callable[[], Tensor]], float]) -> int:
    """The place of the call that takes the fewest seconds, of those after the first that do not fail."""
    times = [seconds(calls[0])]
    for call in calls[1:]:
        try:
            times.append(seconds(call))
        except RuntimeError:  # of Triton: more registers or shared memory than this GPU has
            times.append(math.inf)
    return times.index(min(times))


class Int8(Product):
    """One int8 product a layer. Every device that runs it gives the same sums, those of exact arithmetic."""

    name, cost = "cuda-int8", 20
    description = "integer tensor cores: int8 codes, exact sums, scales afterwards"
    dtype, capability, unit_name = torch.int8, (7, 5), "integer tensor cores"
    MULTIPLE = 8

    def fails(self, layer: nn.Module, device: torch.device) -> str | None:
        return _fails(device)

    def multiply(self, codes: Tensor, token: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        weight, channel, bias = self.weight(layer), layer.kernel_channel, layer.bias
        if codes.is_cuda:
            return integer_product(codes, weight, token, channel, None if bias is None else bias.detach(), dtype)
        return finish(product(codes, weight), token, channel, bias, dtype)


KERNEL = Int8()
