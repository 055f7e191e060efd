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
from dmquant.errors import UserError


class Teacher:
    """Predictions of a backbone, kept for some samples of its calibration data, and the error of what it predicts now.

    The error of a batch is the mean square of the difference of the two predictions (rows, channels, ...), in float32,
    over what the pipeline reads of them: a backbone that also predicts a variance has twice the channels of its input.
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
        bar: Callable[[int, int, str], None] = lambda done, total, what: None,
    ):
        """Compute the predictions of the samples, indices into `store`, once, in batches.

        They are held in the budget and in files beyond it. `ranges` are told the timesteps of every call, where nothing
        else tells them. Raises UserError for predictions that hold NaN or infinity.
        """
        self.backbone, self.store, self.samples, self._ranges = backbone, store, list(samples), ranges
        self.device, kept = next(backbone.parameters()).device, None
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
        self._kept = kept

    def predict(self, batch: Sequence[int]) -> Tensor:
        """What the backbone predicts now for a batch of samples, (samples * rows, channels, ...); differentiable."""
        if self._ranges is not None:
            self._ranges.set(timesteps_of(self.store, batch).repeat_interleave(self.store.rows).to(self.device))
        args, kwargs = self.store.batch(batch, self.device)
        return prediction_of(self.backbone(*args, **kwargs), (args, kwargs))

    def target(self, batch: Sequence[int]) -> Tensor:
        """What it predicted in full precision, of the shape and dtype of `predict`."""
        return self._kept.read(batch, self.device)

    def error(self, batch: Sequence[int]) -> Tensor:
        """The error of a batch of samples, a scalar float32; differentiable."""
        return (self.predict(batch).float() - self.target(batch).float()).square().mean()

    def close(self) -> None:
        """Give back memory or disk."""
        self._kept.close()


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
