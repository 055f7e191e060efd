"""The predictions of a backbone in full precision, and how far those of its student are from them.

A teacher is made while the backbone is in full precision. From then on its own layers may be replaced: what is computed
is the student's prediction, what it is compared with was kept.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.outputs import Budget, Outputs, first_sample
from dmquant.calib.blocks.prediction import prediction_of
from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.data.store import CalibrationStore, timesteps_of
from dmquant.errors import UsageError, UserError, check_choice

WEIGHTINGS = ("none", "relative", "sampler")


class Teacher:
    """Predictions of a backbone, kept for some samples of its calibration data, and the error of what it predicts now.

    The error of a sample is the mean square of the difference of the two predictions (rows, channels, ...), in float32,
    over what the pipeline reads of them: a backbone that also predicts a variance has twice the channels of its input.
    With a scale of `guidance`, the rows of a sample are without the prompt and with it, and the difference is that of
    what the sampler makes of them, d_without + guidance (d_with - d_without): mostly what the two do not share, which
    may stay as it is while the errors of both rows halve. It is weighted by the sample's step of the schedule:

    - `none`: all alike.
    - `relative`: by the inverse of the mean square of the predictions at that step. It is twice the Kullback-Leibler
      divergence |d|^2 / (2 sigma^2) of two Gaussians around the predictions, with that mean square as variance sigma^2.
    - `sampler`: the relative error by how much it moves the final latents, the measured importance of the step
      (`dmquant.calib.data.importance`) over the mean of all steps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        store: CalibrationStore,
        samples: Sequence[int],
        budget: Budget,
        *,
        batch_size: int,
        ranges: TimestepRanges | None = None,
        weighting: str = "none",
        guidance: float | None = None,
        bar: Callable[[int, int, str], None] = lambda done, total, what: None,
    ):
        """Compute the predictions of the samples, indices into `store`, once, in batches.

        They are held in the budget and in files beyond it. `ranges` are told the timesteps of every call, where nothing
        else tells them. Raises UsageError for an unknown weighting, and for `sampler` where the data was captured
        without importances; UserError for predictions that hold NaN or infinity.
        """
        if check_choice("weighting", weighting, WEIGHTINGS) == "sampler" and store.weights is None:
            raise UsageError(
                "weighting by the sampler needs the importance of every step, which calibration data has with "
                "calibration.sampler: importance"
            )
        self.backbone, self.store, self.samples, self._ranges = backbone, store, list(samples), ranges
        self.device, self.guidance = next(backbone.parameters()).device, guidance
        kept, squares, count = None, torch.zeros(store.steps), torch.zeros(store.steps)
        with torch.no_grad():
            for start in range(0, len(self.samples), batch_size):
                bar(start, len(self.samples), "full precision")
                batch = self.samples[start : start + batch_size]
                prediction = self.predict(batch)
                if not prediction.isfinite().all():
                    raise UserError(
                        "the backbone predicts NaN or infinity on calibration data: calibrate in --dtype fp32 or bf16"
                    )
                kept = kept or Outputs(self.samples, first_sample(prediction, len(batch)), budget)
                kept.write(batch, prediction)
                steps = torch.tensor([store.samples[index].step for index in batch])
                squares.index_add_(0, steps, _by_sample(prediction.float().square(), len(batch)).cpu())
                count.index_add_(0, steps, torch.ones(len(batch)))
        self._kept = kept
        weights = torch.ones(store.steps)
        if weighting != "none":
            weights = count / squares.clamp(min=torch.finfo().tiny)
        if weighting == "sampler":
            importance = torch.tensor(store.weights)
            weights *= importance / importance.mean()
        self.weights = weights
        """How much the error of each step of the schedule counts, (steps,) float32."""

    def predict(self, batch: Sequence[int]) -> Tensor:
        """What the backbone predicts now for a batch of samples, (samples * rows, channels, ...); differentiable."""
        if self._ranges is not None:
            self._ranges.set(timesteps_of(self.store, batch).repeat_interleave(self.store.rows).to(self.device))
        args, kwargs = self.store.batch(batch, self.device)
        return prediction_of(self.backbone(*args, **kwargs), (args, kwargs))

    def target(self, batch: Sequence[int]) -> Tensor:
        """What it predicted in full precision, of the shape and dtype of `predict`."""
        return self._kept.read(batch, self.device)

    def errors(self, batch: Sequence[int]) -> Tensor:
        """The weighted error of each sample of a batch, (samples,) float32; differentiable."""
        difference = self.predict(batch).float() - self.target(batch).float()
        if self.guidance is not None:
            without, given = difference.unflatten(0, (len(batch), 2)).unbind(1)
            difference = without + self.guidance * (given - without)
        weights = self.weights[[self.store.samples[index].step for index in batch]].to(self.device)
        return _by_sample(difference.square(), len(batch)) * weights

    def error(self, batch: Sequence[int]) -> Tensor:
        """The mean over a batch of the samples' weighted errors, a scalar float32; differentiable."""
        return self.errors(batch).mean()

    def close(self) -> None:
        """Give back memory or disk."""
        self._kept.close()


def _by_sample(values: Tensor, samples: int) -> Tensor:
    """Means over all that belongs to each sample, (samples,)."""
    return values.reshape(samples, -1).mean(1)


@contextlib.contextmanager
def checkpointing(backbone: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Until the block ends, these modules keep their inputs for the backward pass and compute all else again in it.

    Outputs and gradients are the same to the last bit: Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    arXiv 1604.06174. Passes without gradient are as they were. What a module writes into its own inputs, or into what
    its layers have read, must not be checkpointed (`Block.overwrites`).
    """

    def again(compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute(*args, **kwargs)
            return checkpoint(compute, *args, use_reentrant=False, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for name in blocks:
            module = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(module, again(module.forward)))
        yield
