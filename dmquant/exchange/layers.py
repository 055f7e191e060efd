"""What the exporters ask of quantized layers: the name of a block format, why a layer cannot go, tensors as bytes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import DTYPES, Entry
from dmquant.qtensor import WeightSpec
from dmquant.scaling import BLOCK_FORMATS

HIGH = "high precision"


def block_format(spec: WeightSpec) -> str | None:
    """`nvfp4`, `mxfp4`, `mxfp6` or `mxfp8` where weights are in such blocks, that cross no split; None elsewhere."""
    kind = (spec.fmt.name, str(spec.granularity), spec.store)
    name = next((name for name, block in BLOCK_FORMATS.items() if block == kind), None)
    return None if name and spec.split and spec.split % spec.granularity.size else name


def described(spec: WeightSpec) -> str:
    """Format, granularity and store of weights, for people."""
    return block_format(spec) or f"{spec.fmt.name} with {spec.store} scales a {spec.granularity}"


def check_class(layer: nn.Module, columns: int) -> str | None:
    """Why a layer is no linear layer whose inputs are whole blocks of `columns`; None where it is."""
    if not isinstance(layer, nn.Linear):
        return f"is a {type(layer).__name__.removeprefix('Quant')}, and linear layers alone are taken"
    if layer.in_features % columns:
        return f"has {layer.in_features} inputs, no multiple of {columns}"
    return None


def check(source: Source, target: str, refuses: Callable[..., str | None], held: Sequence[str] = ()) -> None:
    """UserError, naming layer, reason and recipe, for the first quantized layer that the target cannot take as it is.

    `held` are the transforms that the target has a place for.
    """
    for name, layer in source.layers.items():
        why = refuses(layer, layer.weight_spec, layer.activations)
        others = [str(one) for one in layer.transforms if one.name not in held]
        if why is None and others:
            why = f"has the transform {others[0]}, for which there is no place"
        if why is not None:
            raise UserError(f"{target} cannot take {name}: it {why}; quantize with --for {target}")


def unquantized(source: Source) -> list[Entry]:
    """Entries of all that is not quantized, the biases of quantized layers included, as stored and by its own name."""
    biases = [f"{name}.bias" for name, layer in source.layers.items() if layer.bias is not None]
    headers = {name: source.header(name) for name in (*source.rest, *biases)}
    return [
        Entry(name, DTYPES[header.dtype], header.shape, lambda name=name: source.tensor(name))
        for name, header in headers.items()
    ]


def bytes_of(source: Source, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Reads the bytes of a part of a quantized layer as `dtype`, (rows, columns)."""
    return lambda: source.tensor(name).view(dtype)


def float_scale(source: Source, name: str) -> Callable[[], Tensor]:
    """Reads and decodes the scales of a quantized layer, float32 (scale rows, scale columns)."""
    return lambda: source.layer(name).scales.decode()
