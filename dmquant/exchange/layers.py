"""What the exporters ask of quantized layers: the name of a block format, why a layer cannot go, tensors as bytes."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.errors import UsageError, UserError
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import DTYPES, Entry
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec
from dmquant.scaling import BLOCK_FORMATS

HIGH = "high precision"


def block_format(spec: WeightSpec) -> str | None:
    """`nvfp4`, `mxfp4`, `mxfp6` or `mxfp8` where weights are in such blocks, that cross no split; None elsewhere."""
    kind = (spec.fmt.name, str(spec.granularity), spec.store)
    name = next((name for name, block in BLOCK_FORMATS.items() if block == kind), None)
    return None if name and spec.split and spec.split % spec.granularity.size else name


def kind_of_weights(spec: WeightSpec) -> str:
    """Weights by a short name: `nvfp4`, `fp8_e4m3 a channel`, `int4 a group:64`, ...; the scales' store is left out."""
    return block_format(spec) or f"{spec.fmt.name} a {spec.granularity}"


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


def check_pair(spec: WeightSpec, activations: ActivationSpec | None, taken: Sequence[str | None]) -> str | None:
    """Why weights of this specification do not go with these inputs; None where they do.

    `taken` are the inputs that they go with, by their names of `kind_of`; none for weights that have no place at all.
    """
    if not taken:
        return f"has weights in {described(spec)}"
    if spec.split is not None and block_format(spec) is None:
        return "has scales of their own for two halves of its input"
    if (given := kind_of(activations)) in taken:
        return None
    listed = " or ".join(kind or "16 bits" for kind in taken)
    return f"has inputs in {given or '16 bits'}, and weights in {described(spec)} go there with inputs in {listed}"


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
    return as_stored(source, (*source.rest, *biases))


def as_stored(source: Source, names: Iterable[str]) -> list[Entry]:
    """Entries of tensors as they are, by their own names."""
    return [
        Entry(name, DTYPES[header.dtype], header.shape, functools.partial(source.tensor, name))
        for name, header in ((name, source.header(name)) for name in names)
    ]


def bytes_of(source: Source, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Reads the bytes of a part of a quantized layer as `dtype`, (rows, columns)."""
    return lambda: source.tensor(name).view(dtype)


def float_scale(source: Source, name: str) -> Callable[[], Tensor]:
    """Reads and decodes the scales of a quantized layer, float32 (scale rows, scale columns)."""
    return lambda: source.scales(name)


def high_precision(source: Source) -> list[str]:
    """The linear layers and convolutions that are not quantized."""
    return [name for name, module in source.backbone.named_modules() if type(module) in QUANTIZED]


def counted(source: Source, kinds: Iterable[str]) -> dict[str, int]:
    """The numbers of layers by kind, those that stay in high precision included."""
    high = len(high_precision(source))
    return {**Counter(kinds), **({HIGH: high} if high else {})}


def inputs(format: str, engine: str, scale: str = "online", granularity: str = "token") -> ActivationSpec:
    """Inputs in a format, rounded as an engine does; by our own rule where that of its kernel is not known."""
    plain = ActivationSpec.parse(format, granularity, scale=scale)
    try:
        return ActivationSpec.parse(format, granularity, scale=scale, engine=engine)
    except UsageError:
        return plain


def kind_of(activations: ActivationSpec | None) -> str | None:
    """Inputs by a short name: `nvfp4`, `static nvfp4`, `mxfp8`, `fp8_e4m3 a token`, `static fp8_e4m3 a tensor`, ...

    None where they are not rounded. Static scales that tell timesteps apart, halves of the input, and means that stay
    exact are named so.
    """
    if activations is None:
        return None
    given = (activations.fmt.name, str(activations.granularity), activations.store)
    block = next((name for name, block in BLOCK_FORMATS.items() if block == given), None)
    static = {None: "", 1: "static "}.get(activations.ranges, f"static:{activations.ranges} ")
    split = " in two halves" if activations.split is not None else ""
    plain = f"{activations.fmt.name} a {activations.granularity}"
    store = "" if activations.store == "fp32" else f" in {activations.store}"
    return static + (block or plain + store) + (" around means" if activations.center else "") + split


def rounded_by(activations: ActivationSpec | None) -> str | None:
    """The engine whose rounding of inputs was emulated, None where it is dmquant's own."""
    return activations and activations.engine and activations.engine.name


def input_notes(source: Source, engine: str) -> tuple[str, ...]:
    """What to say where inputs were not rounded as the engine does when the model was calibrated and scored."""
    rounded = [layer.activations for layer in source.layers.values() if layer.activations is not None]
    others = sorted({rounded_by(one) or "dmquant" for one in rounded} - {engine})
    return tuple(
        f"inputs were scored as {other} rounds them, which {engine} does by its own rule: --for {engine} scores that"
        for other in others
    )
