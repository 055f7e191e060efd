"""Bias correction: add to each output channel the mean that quantization took from it.

b += E[W x] - E[W^ x^] (Nagel et al., arXiv 1906.04721, section 4.2), measured on calibration data with the inputs that
the quantized layers before give, after rounding; over all timesteps or apart for ranges of them.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dmquant.activations import static_scale
from dmquant.transforms.base import InputStatistics, Part, Residuals, Transform


class Options(BaseModel):
    """What a recipe may set."""

    model_config = ConfigDict(extra="forbid")

    ranges: int = Field(default=1, ge=1)
    """Timestep ranges with a correction of their own."""


class Bias(Transform):
    """A table (ranges, output channels) in float32, beside the layer's own bias, which it may lack."""

    STAGE = 40

    @classmethod
    def takes_data(cls, options: Options) -> bool:
        return True

    @classmethod
    def corrects(cls, options: Options) -> bool:
        return True

    def ranges(self) -> int:
        return self.options.ranges

    def parts(self) -> dict[str, Part]:
        return {"table": Part((self.options.ranges, self.shape[0]), torch.float32)}

    def fit(self, weight: Tensor, statistics: InputStatistics | None) -> list[dict[str, Tensor]]:
        return [{"table": weight.new_zeros(self.options.ranges, self.shape[0])}]

    def correct(self, residuals: Residuals) -> dict[str, Tensor]:
        return {"table": residuals.outputs}

    def add_to(self, y: Tensor, layer: nn.Module, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return y + static_scale(parts["table"], layer.timestep_ranges, x, layer.channel_dim).to(x.dtype)

    def __str__(self) -> str:
        return f"bias:{self.options.ranges}"


METHOD = Bias
