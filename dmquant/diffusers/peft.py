"""The `weight` of a layer that peft wraps, where it wraps a quantized one.

peft takes any `qweight` for GPTQ's and gives that as the wrapper's weight. T5 and others cast their inputs to the dtype
of a layer's weight: in bytes nothing of them would be left.
"""

from typing import Any

from torch import Tensor

from dmquant.layers import QUANTIZED


def mend_weight(wrapper: type) -> None:
    """Let `weight` of peft's BaseTunerLayer, `wrapper`, be that of the quantized layer that it wraps, not its bytes."""
    of_peft, quantized = wrapper.weight.fget, tuple(QUANTIZED.values())

    def weight(layer: Any) -> Tensor:
        base = layer.get_base_layer()
        return base.weight if isinstance(base, quantized) else of_peft(layer)

    wrapper.weight = property(weight)
