"""What peft does to a layer that it wraps and unwraps, where that is a quantized one.

peft takes any `qweight` for GPTQ's and gives that as the wrapper's weight. T5 and others cast their inputs to the dtype
of a layer's weight: in bytes nothing of them would be left. And where it takes a wrapper off, it gives the layer in it
the weight that it has, which a quantized layer does not take.
"""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dmquant.layers import QUANTIZED


def mend(module: ModuleType) -> None:
    """Let wrappers of peft's `tuners_utils` have the weight of the quantized layer in them, and be taken off it."""
    wrapper, tuner, quantized = module.BaseTunerLayer, module.BaseTuner, tuple(QUANTIZED.values())
    of_wrapper, put_back = wrapper.weight.fget, tuner._replace_module

    def weight(layer: Any) -> Tensor:
        base = layer.get_base_layer()
        return base.weight if isinstance(base, quantized) else of_wrapper(layer)

    def replace(self: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
        if isinstance(new, quantized):
            setattr(parent, name, new)
        else:
            put_back(self, parent, name, new, child)

    wrapper.weight, tuner._replace_module = property(weight), replace
