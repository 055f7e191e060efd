"""Look at what the layers of a block are given while it is calibrated, and sum up what is decided by it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dmquant.calib.moments import Moments, alike, columns_of, some_of
from dmquant.calib.ranges import nearest_seen
from dmquant.calib.streams import Bar, Streams
from dmquant.calib.units import Task
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.transforms import InputStatistics

SAMPLES = 32  # calls of a layer whose inputs are kept, spread over the schedule
TOKENS, SIDE = 64, 16  # of each row of these at most so many tokens, or in its middle pixels in each direction


class InputObserver:
    """Collects `InputStatistics` of one layer over `calls` calls, told apart by timestep as its transforms want.

    The timesteps are those that `quantized.timestep_ranges` was told last.
    """

    def __init__(self, quantized: QuantLinear | QuantConv2d, calls: int):
        self.dim, self.every, self.calls = quantized.channel_dim, -(-calls // SAMPLES), 0
        self.timesteps = quantized.timestep_ranges
        self.count = max(transform.observed_ranges() for transform in quantized.transforms)
        self.absmax: Tensor | None = None
        self.seen = torch.zeros(self.count, dtype=torch.bool)
        self.sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count one input; of every few of them, the first two rows are kept: of guidance, one of each branch."""
        of_rows = self.timesteps.of_rows[self.count] if self.count > 1 else torch.zeros(1, dtype=torch.int64)
        channels_last = x.movedim(self.dim, -1)
        largest = channels_last.reshape(len(of_rows), -1, channels_last.shape[-1]).abs().amax(1).float()
        if self.absmax is None:
            self.absmax = largest.new_zeros(self.count, largest.shape[1])
        for number in of_rows.unique().tolist():
            self.seen[number] = True
            self.absmax[number] = self.absmax[number].maximum(largest[(of_rows == number).to(x.device)].amax(0))
        if self.calls % self.every == 0:
            rows = x[:2]  # those of a sample stay together (calib.store)
            if self.dim != -1:
                top, left = (max(0, (side - SIDE) // 2) for side in rows.shape[-2:])
                rows = rows[..., top : top + SIDE, left : left + SIDE]
            elif rows.ndim > 2:
                rows = rows[..., some_of(rows.shape[-2], TOKENS, rows.device), :]
            self.sample.append(rows.clone())
        self.calls += 1

    def statistics(self) -> InputStatistics | None:
        """None where no sample reached the layer."""
        if self.absmax is None:
            return None
        return InputStatistics(self.absmax[nearest_seen(self.seen).to(self.absmax.device)], self.sample)


class BlockInputs:
    """Inputs of the layers of one block, as the quantized blocks before it give them, over the samples to learn from.

    `title` and `bar` are those of the block's progress.
    """

    def __init__(self, streams: Streams, number: int, learning: Sequence[int], title: str, bar: Bar):
        self.streams, self.number, self.learning, self.title, self.bar = streams, number, learning, title, bar

    def run(self, task: Task) -> None:
        """Run a task over the samples, for what hooks see of it."""
        for batch in self.streams.batches(self.learning, f"{self.title}: inputs", self.bar):
            self.streams.run(self.streams.quantized, self.number, task.output, batch)

    def statistics(
        self, task: Task, layers: Mapping[str, QuantLinear | QuantConv2d]
    ) -> dict[str, InputStatistics | None]:
        """What the transforms look at that are fitted to the inputs of their layer; only of layers with such.

        `layers` are the task's as they will quantize their inputs.
        """
        calls = -(-len(self.learning) // self.streams.batch_size)
        observers = {
            name: InputObserver(layer, calls)
            for name, layer in layers.items()
            if any(
                one.takes_data(one.options) and not (one.corrects(one.options) or one.weighs_by_moments(one.options))
                for one in layer.transforms
            )
        }
        self._watch(task, {name: observer.add for name, observer in observers.items()})
        return {name: observer.statistics() for name, observer in observers.items()}

    def moments(
        self, task: Task, layers: Mapping[str, QuantLinear | QuantConv2d], empty: Mapping[str, Moments]
    ) -> dict[str, Moments]:
        """Second moments of transformed and quantized inputs, added to `empty`; without layers that no sample reached.

        `layers` are those of the task, by name, as they will quantize their inputs.
        """
        backbone = self.streams.backbone

        def adding(name: str) -> Callable[[Tensor], None]:
            layer, quantized, moments = backbone.get_submodule(name), layers[name], empty[name]

            def add(x: Tensor) -> None:
                x = quantized.quantize_input(quantized.transform_input(x))
                moments.add(columns_of(layer, alike(x) if moments.in_full else x))

            return add

        self._watch(task, {name: adding(name) for name in empty})
        return {name: moments for name, moments in empty.items() if moments.tokens}

    def _watch(self, task: Task, watchers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run a task with each of these layers, by name, showing its inputs to its watcher."""
        if not watchers:
            return

        def showing(watcher: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda layer, args: watcher(args[0])

        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, watcher in watchers.items():
                layer = self.streams.backbone.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(showing(watcher)).remove)
            self.run(task)
