"""Bias correction: add to each output channel the mean that quantization took from it.

b += E[W x] - E[W^ x^] (Nagel et al., arXiv 1906.04721, section 4.2), measured on calibration data with the inputs that
the quantized layers before give, after rounding; over all timesteps or apart for ranges of them.
"""

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dmquant.activations import static_scale
from dmquant.transforms.interfaces import Method, Part, Parts, Residuals, Storage


class Options(BaseModel, extra="forbid"):
    """Options of bias correction in a recipe."""

    ranges: int = Field(default=1, ge=1)
    """Timestep ranges with a correction of their own."""


class Bias(Storage):
    """A table (ranges, output channels) in float32, beside the layer's own bias, which it may lack."""

    name = "bias"
    STAGE = 40

    @property
    def timestep_ranges(self) -> int:
        return self.options.ranges

    def parts(self) -> dict[str, Part]:
        return {"table": Part((self.options.ranges, self.shape[0]), torch.float32)}

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: Parts) -> Tensor:
        return y + static_scale(parts["table"], layer.timestep_ranges, x, layer.channel_dim).to(x.dtype)

    def __str__(self) -> str:
        return f"bias:{self.options.ranges}"


def correct(storage: Bias, residuals: Residuals) -> Parts:
    """E[W x] - E[W^ x^], arXiv 1906.04721, section 4.2."""
    return {"table": residuals.outputs}


METHOD = Method(Options, Bias, correction=lambda options: correct)
