"""The interface of every objective, and the data of a unit that it may use."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.data.tree import flatten

TAIL, IMPORTANCE = "tail", "importance"  # what an objective may need: `predict` and `prediction`, or `importance`
SAME_INPUTS = "same_inputs"
LEAST = 1e-6  # of the mean square of a batch: a row that is all but zero counts by this instead of its own
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class UnitData:
    """Data of one unit: `run(indices, generator)` computes its output for a batch of samples, with its layers as
    `learning_layers` has them, `target(indices)` is the output in full precision, nested alike and of the same shapes.
    `learning` and `held_out` are indices of samples, sorted by step. `overwrites`: the unit's code writes into tensors
    that autograd keeps.

    The rest is there for objectives that need it (`needs` of their module). `predict(indices, generator)` gives the
    output and the prediction that the rest of the network, in full precision, makes of it, (rows, ...);
    `prediction(indices)` is that of full precision throughout. `importance(indices)` are weights of the samples by how
    far an error of the prediction at their step moves the final latents, (samples,) float32, 1 on average.
    `same_inputs(indices)` is the output of the unit in full precision on what the quantized blocks before it give.
    """

    run: Callable[[Sequence[int], torch.Generator | None], Any]
    target: Callable[[Sequence[int]], Any]
    learning: Sequence[int]
    held_out: Sequence[int]
    overwrites: bool = False
    predict: Callable[[Sequence[int], torch.Generator | None], tuple[Any, Tensor]] | None = None
    prediction: Callable[[Sequence[int]], Tensor] | None = None
    importance: Callable[[Sequence[int]], Tensor] | None = None
    same_inputs: Callable[[Sequence[int]], Any] | None = None

    def graph(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a pass forward and back."""
        return torch.autograd.graph.allow_mutation_on_saved_tensors() if self.overwrites else contextlib.nullcontext()


class Objective:
    """What the roundings of one unit are judged by, on held-out samples, and learned by."""

    def __init__(self, data: UnitData):
        self.data = data

    def error(self, batch: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """The error of the unit over a batch of samples, a scalar: the mean of the samples' own. Differentiable.

        With a `generator`, which draws what is random in learning.
        """
        raise NotImplementedError

    def loss(self, batch: Sequence[int], generator: torch.Generator, step: int) -> Tensor:
        """What is minimized in step `step`, from 1, over a batch of samples: a scalar in the unit of `error`."""
        return self.error(batch, generator)


def squared_error(output: Any, target: Any) -> Tensor:
    """Mean squared difference of two outputs, a scalar in float32.

    Outputs are tensors, or nest tensors alike, in pairs of the same shape; the result is the mean of their means.
    Tensors that are not floating-point count for nothing.
    """
    pairs = zip(flatten(output)[1], flatten(target)[1], strict=True)
    floats = [(one.float(), other.float()) for (_, one), (_, other) in pairs if one.is_floating_point()]
    return torch.stack([(one - other).square().mean() for one, other in floats]).mean()


def sample_errors(output: Any, target: Any, samples: int, relative: bool = False) -> Tensor:
    """Mean squared differences of the samples, (samples,) float32, whose mean is `squared_error`.

    Outputs are as there, of so many samples, whose rows are together. `relative`: every row's over the mean square of
    its target.
    """
    errors = []
    for (_, one), (_, other) in zip(flatten(output)[1], flatten(target)[1], strict=True):
        if one.is_floating_point():
            one, other = one.float().flatten(1), other.float().flatten(1)
            of_rows = (one - other).square().mean(1)
            if relative:
                size = other.square().mean(1)
                of_rows = of_rows / size.clamp(min=LEAST * size.mean().item() + _TINY)
            errors.append(of_rows.unflatten(0, (samples, -1)).mean(1))
    return torch.stack(errors).mean(0)
