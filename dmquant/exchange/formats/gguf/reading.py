"""Reading GGUF: which tensors are quantized, and their weights."""

import functools
from collections import Counter

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.exchange.formats.gguf.header import NUMBERS, PLAIN, SHAPES, read
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found
from dmquant.host import weight_file

WEIGHT = ".weight"


def recognises(found: Found) -> bool:
    return found.load is not None and "general.architecture" in found.metadata


def open_gguf(form: ForeignFormat, found: Found) -> Foreign:
    """The quantized tensors as layers, those in F32, F16 and BF16 as the rest; no weight is read."""
    layers, rest = {}, []
    for name, tensor in found.tensors.items():
        if tensor.dtype in PLAIN:
            rest.append(name)
            continue
        if not name.endswith(WEIGHT) or len(tensor.shape) < 2:
            raise UserError(f"{found.path}: '{name}' of shape {list(tensor.shape)} is quantized and no layer's weight")
        layer = name.removesuffix(WEIGHT)
        weight = functools.partial(decoded, found, tensor)
        layers[layer] = ForeignLayer(layer, tensor.dtype.lower(), tensor.shape, tensor.end - tensor.begin, weight)
    counts = Counter(layer.format for layer in layers.values())
    dialect = {
        "architecture": found.metadata["general.architecture"],
        "types": ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
    }
    flattened = sum(name.startswith(SHAPES) for name in found.metadata)
    if flattened:
        dialect["flattened tensors"] = f"{flattened}, in rows of 256 (comfy.gguf.orig_shape)"
    return Foreign(form, found, dialect, layers, tuple(rest))


def decoded(found: Found, tensor: weight_file.Tensor) -> Tensor:
    """The weight of a quantized tensor, float32 in its shape, as gguf decodes it."""
    gguf = library("reading GGUF")
    data = read(found.files[0], tensor).view(-1, gguf.GGML_QUANT_SIZES[NUMBERS[tensor.dtype]][1])
    values = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(NUMBERS[tensor.dtype]))
    return torch.from_numpy(values).view(tensor.shape)


def library(what: str):
    """The package gguf; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{what} takes the package gguf: pip install 'dmquant[gguf]'") from None
    return gguf
