"""Fuse adapters of peft into quantized layers: decode, add, and quantize again as each layer says; or put back.

peft merges into a float layer whatever its kind of adapter adds. It is given one of the decoded weight in place of the
quantized layer, whose codes are then made anew, without data: what calibration solved or learned of the old codes is
gone, and its scales, transforms and corrections stay as they are stored, except for the scales of the codes.
"""

import contextlib
import copy
import functools
import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusers.dequantize import become_float_
from dmquant.errors import UsageError, UserError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import quantize
from dmquant.scaling import DATA_RULES

STORED = ("qweight", "scale", "scale_base", "bias")
_QUANTIZED = tuple(QUANTIZED.values())


@dataclass(frozen=True)
class Fused:
    """What fusing lost of one layer: || new weight - (weight + change) || over || change || and over || weight ||.

    The weight is the layer's before, as quantized; the change is all that the adapters add to it.
    """

    layer: str
    of_change: float
    of_weight: float


@contextlib.contextmanager
def requantizing(model: Any) -> Iterator[list[Fused]]:
    """Until the block ends, what merges adapters into a model or a pipeline quantizes the layers anew.

    So do `fuse_lora` of diffusers and `merge_adapter` and `merge_and_unload` of peft. Yields a list that gets a row for
    each layer, and logs its sum in one line. `unfuse_lora` and `unmerge_adapter` put the codes back, bit for bit, as
    long as the adapters are not unloaded. Raises UsageError where no quantized layer has an adapter, and UserError,
    before anything changes, for layers that are offloaded.
    """
    layers, rows = adapted_layers(model), []
    if not layers:
        raise UsageError("no quantized layer has an adapter: load one first (load_lora_weights, add_adapter)")
    for name, layer in layers.items():
        if "forward" in vars(layer.base_layer) or layer.base_layer.qweight.is_meta:
            raise UserError(f"{name} is offloaded or cast by hooks: fuse adapters before these are put on")
    try:
        for name, layer in layers.items():
            layer.merge = functools.partial(_merge, layer, name, rows)
        yield rows
    finally:
        for layer in layers.values():
            vars(layer).pop("merge", None)
    if rows:
        of_change, of_weight = (statistics.mean(each) for each in zip(*map(_losses, rows), strict=True))
        worst = max(rows, key=_losses)
        logging.getLogger("dmquant").info(
            f"adapters fused into {len(rows)} layers, which were quantized again; mean errors: {of_change:.2f} of what "
            f"adapters change, {of_weight:.4f} of the weights; most in {worst.layer}: {worst.of_change:.2f}"
        )


def _losses(row: Fused) -> tuple[float, float]:
    return row.of_change, row.of_weight


def adapted_layers(model: Any) -> dict[str, nn.Module]:
    """peft's wrappers of quantized layers, by name, in a model or in all models of a pipeline."""
    parts = {"": model} if isinstance(model, nn.Module) else dict(model.components)
    return {
        f"{part}.{name}".strip("."): layer
        for part, module in parts.items()
        if isinstance(module, nn.Module)
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "base_layer", None), _QUANTIZED)
    }


def with_requantize(fuse: Callable[..., Any]) -> Callable[..., Any]:
    """A `fuse_lora` of diffusers, of models or pipelines, that takes `requantize=True`, and is refused without it
    where that would be needed, before it changes any layer."""

    @functools.wraps(fuse)
    def fuse_lora(model: Any, *args: Any, requantize: bool = False, **kwargs: Any) -> Any:
        if requantize:
            with requantizing(model):
                return fuse(model, *args, **kwargs)
        if any("merge" not in vars(layer) for layer in adapted_layers(model).values()):
            raise UserError(
                "fusing into quantized layers quantizes them again, without data: ask for that by "
                "fuse_lora(requantize=True), or fuse into the full-precision model, then quantize"
            )
        return fuse(model, *args, **kwargs)

    return fuse_lora


@torch.no_grad()
def _merge(
    layer: nn.Module, name: str, rows: list[Fused], safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    """`merge` of one of peft's wrappers, `layer`, of a quantized layer."""
    base, already = layer.base_layer, list(layer.merged_adapters)
    before = base.float_weight()
    layer.base_layer = decoded = become_float_(copy.copy(base), before.clone())
    try:
        type(layer).merge(layer, safe_merge, adapter_names)
    finally:
        layer.base_layer = base
    if layer.merged_adapters == already:
        return
    stored = {part: getattr(base, part) for part in STORED}
    _quantize_again_(base, decoded)
    if not already:
        held = {part: None if one is None else one.detach().cpu() for part, one in stored.items()}
        layer.unmerge = functools.partial(_unmerge, layer, held)
    lost = (base.float_weight() - decoded.weight).norm().item()
    change = (decoded.weight - before).norm().item()
    rows.append(Fused(name, lost / max(change, 1e-30), lost / max(before.norm().item(), 1e-30)))


def _quantize_again_(layer: nn.Module, decoded: nn.Module) -> None:
    """Make the codes of `layer` those nearest to the weight of a float layer, whose bias it takes in its own dtype."""
    weight: Tensor = decoded.weight
    for transform in layer.transforms:
        weight = transform.to_quantize(weight, layer.parts(transform))
    rule = "mse" if layer.weight_spec.scale in DATA_RULES else layer.weight_spec.scale
    bias = None if layer.bias is None else decoded.bias.to(layer.bias.dtype)
    layer.load_quantized(quantize(weight, replace(layer.weight_spec, scale=rule)), bias)


def _unmerge(layer: nn.Module, stored: dict[str, Tensor | None]) -> None:
    """`unmerge` of a wrapper whose layer's codes were `stored` before."""
    base = layer.base_layer
    for name, tensor in stored.items():
        if tensor is not None:
            now = getattr(base, name)
            setattr(base, name, nn.Parameter(tensor.to(now.device, now.dtype), requires_grad=False))
    layer.merged_adapters.clear()
    del layer.unmerge
