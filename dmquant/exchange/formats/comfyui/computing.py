"""A layer of ComfyUI that is more than a weight and a rounded input, as comfy-kitchen's eager backend computes it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, fake_quantize


@dataclass(frozen=True)
class Steps:
    """What makes the output (..., out) of an input (..., in): tensors are float32."""

    weight: Tensor
    """(out, in), of the input that is changed and rounded."""
    change: Callable[[Tensor], Tensor]
    """Changes the input before it is rounded; same dtype and shape."""
    activations: ActivationSpec | None
    """How the changed input is rounded."""
    down: Tensor | None = None
    """(in, rank): with `up` the branch that takes the input as it comes."""
    up: Tensor | None = None
    """(out, rank)."""


class EngineLinear(nn.Module):
    """A Linear layer of ComfyUI."""

    def __init__(self, layer: nn.Linear, steps: Steps, input_scale: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.change, self.activations, self.input_scale = steps.change, steps.activations, input_scale
        dtype, device = layer.weight.dtype, layer.weight.device
        self.bias = layer.bias
        self.weight = nn.Parameter(steps.weight.to(device, dtype), requires_grad=False)
        self.down, self.up = (None if part is None else part.to(device) for part in (steps.down, steps.up))

    def forward(self, x: Tensor) -> Tensor:
        changed = self.change(x)
        if self.activations is not None:
            changed = fake_quantize(changed, self.activations, -1, self.input_scale)
        y = F.linear(changed, self.weight.to(x.dtype))
        if self.down is not None:
            y = y + ((x.float() @ self.down) @ self.up.T).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
