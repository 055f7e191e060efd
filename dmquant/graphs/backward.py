"""Gradients through a quantized layer, for what is trained beside it: adapters, and layers below."""

from typing import Any

import torch
from torch import Tensor, nn


class Product(torch.autograd.Function):
    """The reference's product of a quantized layer, whose gradient goes straight through the rounding of the input.

    Rounding has a derivative of zero almost everywhere: through it an adapter learns nothing of the layers above.
    Straight through (Bengio et al., arXiv 1308.3432) the gradient of the input is that of the dequantized weight alone.
    Nothing is kept for it but the layer, whose weight is dequantized once more in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        """Output of `layer` without its transforms, for an input that has them; in its dtype."""
        ctx.layer, ctx.shape = layer, x.shape
        return type(layer).reference(x, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_input, of_bias, _ = ctx.needs_input_grad
        others = [dim for dim in range(gradient.dim()) if dim != gradient.dim() + ctx.layer.channel_dim]
        of_input = ctx.layer.input_gradient(gradient, ctx.shape) if of_input else None
        return of_input, gradient.sum(others) if of_bias else None, None
