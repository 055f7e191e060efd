"""PD-Quant: the error of the unit's output, and of the prediction that the rest of the network makes of it.

Liu et al., "PD-Quant: Post-Training Quantization based on Prediction Difference Metric", arXiv 2212.07048, eq. 4 and 7,
with the squared error of a predicted noise or velocity in place of the divergence of class probabilities.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dmquant.calib.data.tree import flatten
from dmquant.calib.objectives import mse
from dmquant.calib.objectives.base import IMPORTANCE, TAIL, UnitData, sample_errors

SAMPLES = 16  # by which the size of a unit's output is measured


class Options(mse.Options):
    """Options of the prediction's error in a recipe."""

    weight: float = Field(default=1.0, ge=0)
    """Of the prediction's relative error against the output's."""
    every: int = Field(default=8, ge=1)
    """Steps from one that looks at the prediction to the next."""
    guidance: float = Field(default=1.0, ge=1)
    """Scale by which the sampler puts both rows of a sample together, the unconditional one first; at 1 the error is
    that of each row, which is also that of models without guidance."""
    steps: Literal["alike", "sampler"] = "alike"
    """`sampler`: predictions count by how far an error at their step moves the final latents."""


def needs(options: Options) -> frozenset[str]:
    """What it needs beside the unit's outputs."""
    return frozenset({TAIL, IMPORTANCE} if options.steps == "sampler" else {TAIL})


class Prediction(mse.SquaredError):
    """Error of the output + weight * size of the output * relative error of the prediction.

    The size is the mean square of the output; relative is the error over the mean square of the exact prediction.
    """

    def __init__(self, data: UnitData, options: Options):
        super().__init__(data, options)
        self.options, self.size = options, 1.0
        if options.weight and not self.is_relative:
            some = data.held_out[:: -(-len(data.held_out) // SAMPLES)]
            leaves = [leaf for _, leaf in flatten(data.target(some))[1] if leaf.is_floating_point()]
            self.size = torch.stack([leaf.float().square().mean() for leaf in leaves]).mean().item()

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return self._error(batch, generator, self.options.weight)

    def loss(self, batch: Sequence[int], generator: torch.Generator, step: int) -> Tensor:
        return self._error(batch, generator, 0 if step % self.options.every else self.options.weight)

    def _error(self, batch: Sequence[int], generator: torch.Generator | None, weight: float) -> Tensor:
        if not weight:
            return super().error(batch, generator)
        output, prediction = self.data.predict(batch, generator)
        return self.of_output(output, batch) + weight * self.size * self.of_prediction(prediction, batch)

    def of_prediction(self, prediction: Tensor, batch: Sequence[int]) -> Tensor:
        """The relative error of the predictions (rows, ...) of a batch of samples, a scalar."""
        exact = self.data.prediction(batch)
        pair = [_guided(one, len(batch), self.options.guidance) for one in (prediction, exact)]
        errors = sample_errors(*pair, len(batch), relative=True)
        if self.options.steps == "sampler":
            errors = errors * self.data.importance(batch).to(errors)
        return errors.mean()


def _guided(prediction: Tensor, samples: int, guidance: float) -> Tensor:
    """What the sampler makes of both rows of each sample, (samples, ...); the rows as they are without guidance."""
    rows = prediction.unflatten(0, (samples, -1))
    if guidance == 1 or rows.shape[1] != 2:
        return prediction
    return torch.lerp(rows[:, 0].float(), rows[:, 1].float(), guidance)


start = Prediction
"""The objective of one unit."""
