"""Two streams through a backbone: outputs of its blocks in full precision, and of its blocks as quantized so far."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.outputs import Budget, Outputs, first_sample, mixed, stand_in
from dmquant.calib.blocks.prediction import INSTEAD, prediction_of
from dmquant.calib.blocks.replay import replay, replay_on
from dmquant.calib.blocks.units import Block
from dmquant.calib.data.store import CalibrationStore, timesteps_of
from dmquant.calib.data.tree import flatten, map_floats
from dmquant.errors import UserError
from dmquant.recipe import Learning

Bar = Callable[..., None]
Stream = dict[str, Outputs]


class Streams:
    """`full` and `quantized` hold, by name, the outputs of finished blocks that others still need.

    The quantized stream has every sample, the one in full precision those of `full_of`. `predictions` of the backbone
    in full precision, of every sample, are there where an objective needs them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        blocks: Sequence[Block],
        store: CalibrationStore,
        ranges: TimestepRanges,
        budget: Budget,
        learning: Learning,
        full_of: Sequence[int],
    ):
        self.backbone, self.blocks, self.store, self.ranges, self.budget = backbone, blocks, store, ranges, budget
        self.batch_size, self.full_precision_inputs = learning.batch_size, learning.full_precision_inputs
        self.device = next(backbone.parameters()).device
        self.full_of = full_of
        self.full: Stream = {}
        self.predictions: Outputs | None = None
        self.quantized: Stream = {}

    def carry(self, stream: Stream, number: int, title: str, bar: Bar) -> None:
        """Carry a stream past block `number`, where others need its output."""
        block = self.blocks[number]
        if block.last_use > number:
            stream[block.name] = self.outputs(stream, number, block.name, title, bar)

    def drop(self, number: int) -> None:
        """Give back what no block after block `number` needs."""
        for stream in (self.full, self.quantized):
            for name in [block.name for block in self.blocks if block.last_use <= number and block.name in stream]:
                stream.pop(name).close()

    @contextlib.contextmanager
    def replacing_full(self, stream: Stream) -> Iterator[None]:
        """Let the stream in full precision be this one until the block ends, which closes its outputs."""
        before, self.full = self.full, stream
        try:
            yield
        finally:
            self.full = before
            for outputs in stream.values():
                outputs.close()

    def outputs(self, stream: Stream, number: int, until: str, title: str, bar: Bar) -> Outputs:
        """The output of the module `until`, of block `number` or after it, for every sample of the stream."""
        outputs, samples, kind = None, range(len(self.store.samples)), "quantized"
        if stream is self.full:
            samples, kind = self.full_of, "full precision"
        with torch.no_grad():
            for batch in self.batches(samples, f"{title}: {kind}", bar):
                output = self.run(stream, number, until, batch)
                if not all(leaf.isfinite().all() for _, leaf in flatten(output)[1] if leaf.is_floating_point()):
                    self._blame(stream, number, until, batch)
                if outputs is None:
                    outputs = Outputs(samples, first_sample(output, len(batch)), self.budget)
                outputs.write(batch, output)
        return outputs

    def run(
        self,
        stream: Stream,
        number: int,
        until: str,
        batch: Sequence[int],
        mixing: torch.Generator | None = None,
    ) -> Any:
        """The output of the module `until`, of block `number` or after it, for a batch of samples.

        Tensors of the output are (samples * rows, ...), with the rows of a sample together. With `mixing`, the recipe's
        share of the inputs comes from full precision (`mixed`).
        """
        given = self._given(stream, number, batch, mixing)
        return replay(self.backbone, self.store.batch(batch, self.device), given, until)

    def predict(
        self, number: int, until: str, batch: Sequence[int], mixing: torch.Generator | None = None
    ) -> tuple[Any, Tensor]:
        """The output of the module `until` in the quantized stream, as `run` gives it, and the backbone's prediction.

        The prediction is `prediction_of`'s. What comes after `until` is in full precision, and computes in the
        backbone's own dtype. With gradients, the prediction is differentiable by the output; UserError where it is not.
        """
        own = next(self.backbone.parameters()).dtype

        def passed_on(leaf: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not leaf.requires_grad:
                leaf.requires_grad_()
            return leaf.to(own, copy=True)  # which the rest may overwrite

        given, arguments = self._given(self.quantized, number, batch, mixing), self.store.batch(batch, self.device)
        output, returned = replay_on(
            self.backbone, arguments, given, until, lambda output: map_floats(passed_on, output)
        )
        prediction = prediction_of(returned, arguments)
        if torch.is_grad_enabled() and not prediction.requires_grad:
            raise UserError(f"no gradient goes from the backbone's prediction to {until}: {INSTEAD}")
        return output, prediction

    def predict_in_full(self, title: str, bar: Bar) -> Outputs:
        """The prediction of the backbone as it is now, in full precision, for every sample."""
        predictions, samples = None, range(len(self.store.samples))
        with torch.no_grad():
            for batch in self.batches(samples, title, bar):
                arguments = self.store.batch(batch, self.device)
                prediction = prediction_of(self.backbone(*arguments[0], **arguments[1]), arguments)
                if predictions is None:
                    predictions = Outputs(samples, first_sample(prediction, len(batch)), self.budget)
                predictions.write(batch, prediction)
        return predictions

    def _given(
        self, stream: Stream, number: int, batch: Sequence[int], mixing: torch.Generator | None
    ) -> dict[str, Any]:
        """Outputs of the blocks before block `number` for a batch, whose timesteps are the backbone's from now on."""
        self.ranges.set(timesteps_of(self.store, batch).repeat_interleave(self.store.rows).to(self.device))
        given = {
            block.name: stream[block.name].read(batch, self.device)
            if block.last_use >= number
            else stand_in(block.output, len(batch), self.device, block.is_overwritten)
            for block in self.blocks[:number]
        }
        share = self.full_precision_inputs if mixing is not None else 0.0
        if share:
            for name in stream:
                given[name] = mixed(given[name], self.full[name].read(batch, self.device), share, mixing)
        return given

    def batches(self, indices: Sequence[int], what: str, bar: Bar) -> Iterator[list[int]]:
        """The samples in mini-batches, with progress."""
        for start in range(0, len(indices), self.batch_size):
            bar(start, len(indices), what)
            yield list(indices[start : start + self.batch_size])

    def _blame(self, stream: Stream, number: int, until: str, batch: Sequence[int]) -> None:
        """Name the first layer that gives NaN or infinity."""

        def check(name: str) -> Callable[[nn.Module, tuple, Any], None]:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    raise UserError(
                        f"layer {name} gives NaN or infinity on calibration data: calibrate in --dtype fp32 or bf16"
                    )

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self.backbone.named_modules():
                if not any(module.children()):
                    stack.callback(module.register_forward_hook(check(name)).remove)
            self.run(stream, number, until, batch)
        raise UserError(f"{until} gives NaN or infinity on calibration data: calibrate in --dtype fp32 or bf16")
