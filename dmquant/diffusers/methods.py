"""Methods of diffusers' models that would refuse quantized layers, count them wrongly or lose them.

diffusers refuses to cast every quantized model, and so does what casts inside: `from_pipe`, IP-Adapters, saved LoRAs.
Codes and scales here are bytes, which no cast changes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from dmquant.layers import QUANTIZED

CASTS = ("to", "half", "float")
FUSING = ("fuse_qkv_projections", "fuse_projections")
FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_QUANTIZED = tuple(QUANTIZED.values())


@functools.cache
def extend(kind: type, quantizer: type) -> None:
    """Extend the methods of diffusers' ModelMixin, `kind`, for models whose `hf_quantizer` is a `quantizer`; once."""

    def ours(model: nn.Module) -> bool:
        return isinstance(getattr(model, "hf_quantizer", None), quantizer)

    for name in CASTS:
        setattr(kind, name, _cast(getattr(kind, name), ours))
    kind.num_parameters = _count(kind.num_parameters, ours)
    kind.requires_grad_ = _require(kind.requires_grad_, ours)


def _cast(cast: Callable[..., Any], ours: Callable[[nn.Module], bool]) -> Callable[..., Any]:
    @functools.wraps(cast)
    def casts(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not ours(model):
            return cast(model, *args, **kwargs)
        before, model.is_quantized = model.is_quantized, False
        try:
            return cast(model, *args, **kwargs)
        finally:
            model.is_quantized = before

    return casts


def _count(count: Callable[..., int], ours: Callable[[nn.Module], bool]) -> Callable[..., int]:
    @functools.wraps(count)
    def counts(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found = count(model, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable or not ours(model):  # codes are not trainable
            return found
        return found + sum(map(_weights_less_bytes, model.modules()))

    return counts


def _require(require: Callable[..., Any], ours: Callable[[nn.Module], bool]) -> Callable[..., Any]:
    @functools.wraps(require)
    def requires(model: nn.Module, requires_grad: bool = True) -> nn.Module:
        if not ours(model):
            return require(model, requires_grad)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # bytes have no gradient, and torch refuses to be asked for one
                parameter.requires_grad_(requires_grad)
        return model

    return requires


def _weights_less_bytes(layer: nn.Module) -> int:
    """The weights of a quantized layer less the elements of the tensors that it stores for them; 0 for another."""
    if not isinstance(layer, _QUANTIZED):
        return 0
    stored = ("qweight", "scale", "scale_base", "input_scale", *layer.part_names)
    tensors = (layer._parameters.get(name) for name in stored)
    return math.prod(layer.weight_shape) - sum(tensor.numel() for tensor in tensors if tensor is not None)


def refuse_fusing(module: nn.Module) -> None:
    """Let parts of `module` refuse to fuse projections that are quantized, as `fuse_qkv_projections` would."""
    within = {part for part in module.modules() if any(isinstance(_child(part, name), _QUANTIZED) for name in FUSED)}
    for part in module.modules():
        for name in FUSING:
            if hasattr(type(part), name) and not within.isdisjoint(part.modules()):
                setattr(part, name, _refuse_to_fuse)


def allow_fusing(module: nn.Module) -> None:
    """Undo `refuse_fusing`."""
    for part in module.modules():
        for name in FUSING:
            if vars(part).get(name) is _refuse_to_fuse:
                delattr(part, name)


def _child(part: nn.Module, name: str) -> nn.Module | None:
    child = part._modules.get(name)
    return getattr(child, "base_layer", child)


def _refuse_to_fuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "quantized projections cannot be fused: the fused layer would be a float copy beside the codes, with inputs "
        "that are not quantized: leave them apart, or call dequantize() on the model first"
    )
