"""Two targets for one unit: full precision, and full precision on the very inputs that the quantized unit is given.

CBQ's homologous reconstruction, arXiv 2312.07950. The first lets a unit make up for the error of those before it, the
second asks it for its own share alone. There each is a squared error and a KL divergence of softmaxes over channels;
what blocks of a diffusion model hand on is a residual stream, whose channels are no logits, so that each row's error
over the mean square of its target takes the place of both.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dmquant.calib.objectives import mse
from dmquant.calib.objectives.base import SAME_INPUTS, Objective, UnitData, sample_errors
from dmquant.errors import UsageError


class Options(mse.Options):
    """Options of the homologous error in a recipe."""

    rows: mse.Rows = "relative"
    full_precision: float = Field(default=0.5, ge=0)
    """Weight of the error against full precision throughout."""
    same_inputs: float = Field(default=0.5, ge=0)
    """Weight of the error against the unit in full precision on the same inputs."""

    @model_validator(mode="after")
    def _has_a_target(self) -> "Options":
        if not self.full_precision + self.same_inputs:
            raise UsageError("one of full_precision and same_inputs is above 0, or there is nothing to learn")
        return self


def needs(options: Options) -> frozenset[str]:
    """What it needs beside the unit's outputs."""
    return frozenset({SAME_INPUTS}) if options.same_inputs else frozenset()


class Homologous(Objective):
    """The weighted mean of the errors against both targets; one of weight 0 is not computed."""

    def __init__(self, data: UnitData, options: Options):
        super().__init__(data)
        self.is_relative = options.rows == "relative"
        weights, total = (options.full_precision, options.same_inputs), options.full_precision + options.same_inputs
        pairs = zip(weights, (data.target, data.same_inputs), strict=True)
        self.targets = [(weight / total, target) for weight, target in pairs if weight]

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        output = self.data.run(batch, generator)
        errors = [
            weight * sample_errors(output, target(batch), len(batch), self.is_relative).mean()
            for weight, target in self.targets
        ]
        return torch.stack(errors).sum()


start = Homologous
"""The objective of one unit."""
