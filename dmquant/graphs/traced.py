"""A quantized layer in a graph that torch.compile traces: one operator, which runs the layer as it runs without one.

To trace a layer's Python takes ten times as long as a float layer's, and compiled it is no faster than the kernels. The
operator is given the layer's tensors, and its signature, by which a layer without tensors is found that computes with
them: blocks that are alike share one graph, whatever tensors they have. Layers are traced as they are where gradients
go through them, where their scales depend on the timestep, for torch.export, under autocast, and where a GPU runs the
reference, whose operations torch.compile fuses.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dmquant import kernels

_shells: dict[str, nn.Module] = {}
"""Layers without tensors, by their signature."""
_OPTIONAL = ("bias", "scale_base", "input_scale")
_KEPT = ("_buffers", "_non_persistent_buffers_set", "kernel_choice", "kernel_weights_of")
_choices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the codes of a layer: its signature, its dtype and where its tensors were, and its _KEPT: its kernel and what that
made. Nothing here holds the codes themselves, so that they can go."""


def run(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a quantized layer for `x`, as one operator of the graph that is traced; None where it has none."""
    if torch.compiler.is_exporting() or layer.timestep_ranges is not None or torch.is_autocast_enabled(x.device.type):
        return None
    bias = layer.bias
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if x.device.type != "cpu" and kernels.select(layer, x.device) is kernels.reference.KERNEL:
        return None
    if not _is_known(layer.signature):
        _enter(layer)
    given = {name: tensor for name, tensor in layer._parameters.items() if tensor is not None}
    return torch.ops.dmquant.layer(x, list(given.values()), ",".join(given), layer.signature)


@torch.compiler.assume_constant_result
def _is_known(signature: str) -> bool:
    return signature in _shells


@torch.compiler.assume_constant_result
def _enter(layer: nn.Module) -> None:
    shell = object.__new__(type(layer))
    shell.__dict__ = dict(vars(layer)) | {"_parameters": dict.fromkeys(_OPTIONAL), "kernel_choice": None}
    _shells[layer.signature] = shell


def _layer_of(given: dict[str, Tensor], signature: str, now: tuple[Any, ...]) -> nn.Module:
    """The layer of a signature with tensors by name, and with its choice of kernel where it was made `now` as well."""
    shell, chosen = _shells[signature], _choices.get(given["qweight"])
    kept = chosen[2] if chosen and chosen[:2] == (signature, now) else {"_buffers": {}, "kernel_choice": None}
    layer = object.__new__(type(shell))
    of_now = {"_parameters": vars(shell)["_parameters"] | given, "_dtype": now[0], "kernel_plan": None}
    layer.__dict__ = vars(shell) | of_now | {"_non_persistent_buffers_set": set(), "kernel_weights_of": None} | kept
    return layer


def _laid_out(y: Tensor, layer: nn.Module) -> Tensor:
    """The output in memory as the graph is told that it lies: images channels last, as weights make them."""
    last = y.ndim == 4 and isinstance(layer, nn.Conv2d)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.custom_op("dmquant::layer", mutates_args=())
def _layer(x: Tensor, tensors: Sequence[Tensor], names: str, signature: str) -> Tensor:
    given, now = dict(zip(names.split(","), tensors, strict=True)), (x.dtype, *map(Tensor.data_ptr, tensors))
    layer = _layer_of(given, signature, now)
    y = type(layer).forward(layer, x)
    _choices[layer.qweight] = signature, now, {name: vars(layer).get(name) for name in _KEPT}
    return _laid_out(y, layer)


@_layer.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], names: str, signature: str) -> Tensor:
    layer = _shells[signature]
    if isinstance(layer, nn.Conv2d):
        return _laid_out(layer._conv_forward(x, x.new_empty(layer.weight_shape), None), layer)
    return x.new_empty(*x.shape[:-1], layer.weight_shape[0])
