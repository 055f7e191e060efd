"""CPU: weights of 4 bits expanded by compiled code; the same values as the reference's, bit for bit.

What that code does not take, and every weight where nothing can be compiled, is looked up (`dmquant.cpu.lookup`).
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmquant.cpu import lookup
from dmquant.cpu.addresses import is_plain
from dmquant.cpu.compiling import library
from dmquant.formats import Format, get_format
from dmquant.grids import ScaledGrid
from dmquant.qtensor import WeightSpec
from dmquant.scaling import Scales, from_matrix

WORTH_THREADS = 1 << 17  # weights from which on several threads expand them
FINEST = 6  # the most binary places that a format's values may have
_FUNCTIONS = {torch.float32: "expand_float32", torch.bfloat16: "expand_bfloat16"}
_own = threading.local()


@functools.cache
def _table(fmt: Format) -> tuple[Tensor, float] | None:
    """Values of the 16 codes as int8 multiples of a power of two, and that power; None for formats without."""
    if fmt.bits != 4:
        return None
    values = fmt.decode(torch.arange(16, device="cpu"))
    for places in range(FINEST + 1):
        multiples = values * 2**places
        if multiples.abs().max() <= 127 and torch.equal(multiples, multiples.round()):
            return multiples.to(torch.int8), 2.0**-places
    return None


@functools.cache
def _compiled(dtype: torch.dtype) -> Callable[..., None] | None:
    if dtype not in _FUNCTIONS or (functions := library("expanding")) is None:
        return None
    function = getattr(functions, _FUNCTIONS[dtype])
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, pointer, ctypes.c_float, pointer, size, size, size, ctypes.c_int]
    function.restype = None
    return function


def _group_size(spec: WeightSpec, shape: tuple[int, ...]) -> int | None:
    """Neighbours in a row that share a scale; None where the row's halves have groups that do not end with them."""
    segments = spec.segments(shape)
    size = spec.granularity.size or (segments[0] if len(segments) == 1 else None)
    return size if size and (len(segments) == 1 or not any(columns % size for columns in segments)) else None


def _expand(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], matrix: Tensor) -> bool:
    """Fill `matrix` (rows, columns) with the weights in its dtype; whether there is code that can."""
    if not is_plain(codes) or codes.device.type != "cpu" or spec.grid_type is not ScaledGrid:
        return False
    table, group, function = _table(spec.fmt), _group_size(spec, shape), _compiled(matrix.dtype)
    if table is None or group is None or function is None:
        return False
    values, step = table
    codes, scales = codes.contiguous(), scale.expand(shape[0], -1).contiguous()
    threads = torch.get_num_threads() if matrix.numel() >= WORTH_THREADS else 1
    places = (tensor.data_ptr() for tensor in (codes, scales, values))
    function(*places, step, matrix.data_ptr(), *matrix.shape, group, threads)
    return True


def dequantize(codes: Tensor, scale: Tensor, spec: WeightSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `qtensor.dequantize`, same shapes."""
    if dtype in _FUNCTIONS and not torch.compiler.is_compiling():
        matrix = torch.empty(shape[0], math.prod(shape[1:]), dtype=dtype, device="cpu")
        if _expand(codes, scale, spec, shape, matrix):
            return from_matrix(matrix, shape, spec.split)
    return lookup.dequantize(codes, scale, spec, shape, dtype)


def passing_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """`layer.dequantize(dtype)`, valid until this thread asks for another: in memory that they share.

    Memory that the system has to give anew costs more time than the expansion into it.
    """
    spec, shape = layer.weight_spec, layer.weight_shape
    if dtype in _FUNCTIONS and not torch.compiler.is_compiling():
        matrix = _space(shape[0] * math.prod(shape[1:]), dtype).view(shape[0], -1)
        if _expand(layer.qweight, scales_of(layer.scales), spec, shape, matrix):
            return layer.complete(from_matrix(matrix, shape, spec.split))
    return layer.dequantize(dtype)


def _space(count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements of this thread's memory for weights, which grows to the largest weight."""
    size = count * dtype.itemsize
    if getattr(_own, "memory", None) is None or _own.memory.numel() < size:
        with torch.inference_mode(False):
            _own.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return _own.memory[:size].view(dtype)


@functools.cache
def _minifloats(store: str) -> Tensor | None:
    """Values of the 256 bytes of a store of multiples in a float format; None for other stores."""
    return get_format(f"fp8_{store}").decode(torch.arange(256, device="cpu")) if store in ("e4m3", "e3m4") else None


def scales_of(scales: Scales) -> Tensor:
    """`scales.decode()`, bit for bit: minifloats by table, which takes a sixth of their arithmetic's time."""
    if (table := _minifloats(scales.store)) is None:
        return scales.decode()
    return table.index_select(0, scales.stored.flatten().int()).view(scales.stored.shape).mul_(scales.base)
