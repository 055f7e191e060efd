"""Float layers instead of quantized ones: the weights as quantized, in layers that are saved as full precision."""

import torch
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.layers import QUANTIZED

_FLOAT = {quantized: plain for plain, quantized in QUANTIZED.items()}
_STORED = ("qweight", "scale", "scale_base", "input_scale")
_OWN = ("weight_shape", "_dtype", "weight_spec", "activations", "transforms", "timestep_ranges")


def dequantize_(module: nn.Module) -> None:
    """Make every quantized layer of `module` a float one in its own dtype, in all its places; its hooks stay.

    Transforms of the input are undone. Inputs are no longer quantized, and what corrected the outputs for that (`bias`)
    is gone. Raises UserError, before anything changes, for layers that are offloaded.
    """
    layers = [layer for layer in module.modules() if type(layer) in _FLOAT]
    if any("forward" in vars(layer) or layer.qweight.is_meta for layer in layers):
        raise UserError("some layers are offloaded or cast by hooks: call dequantize() before these are put on")
    for layer in layers:
        become_float_(layer, layer.float_weight().to(layer.dtype))


@torch.no_grad()
def become_float_(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Make a quantized layer a float one of this weight, in its dtype; the same layer."""
    layer.drop_kernel_weights()
    bias, gone = layer.bias, {*_STORED, *layer.part_names}
    for name in (*_OWN, *gone, "bias", "kernel_choice", "kernel_weights_of", "kernel_plan", "signature"):
        vars(layer).pop(name, None)
    others = {name: one for name, one in layer._parameters.items() if name not in {*gone, "bias"}}
    layer.__class__ = _FLOAT[type(layer)]
    layer._parameters = {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias.detach().to(weight.dtype)),
        **others,
    }
    return layer
