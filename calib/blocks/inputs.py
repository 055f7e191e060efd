"""Look at what the layers of a block are given while it is calibrated."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.once import Latest, kind_of_input
from dmquant.calib.blocks.streams import Bar, Stream, Streams
from dmquant.calib.blocks.units import Task
from dmquant.calib.data.watching import Watchers
from dmquant.calib.layers.moments import Moments, alike, columns_of
from dmquant.calib.layers.statistics import InputObserver
from dmquant.errors import UserError
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.transforms import InputStatistics, fit_of


class BlockInputs:
    """Inputs of the layers of one block over the samples to learn from, by default with the quantized blocks before it.

    `title` and `bar` show the progress of the block.
    """

    def __init__(self, streams: Streams, number: int, learning: Sequence[int], title: str, bar: Bar):
        self.streams, self.number, self.learning, self.title, self.bar = streams, number, learning, title, bar

    def run(self, task: Task) -> None:
        """Run a task over the samples, for what hooks see of it."""
        self._run(self.streams.quantized, task.output)

    def run_full_precision(self, until: str, watchers: Watchers) -> None:
        """Run in full precision over the samples, to the end of this block or one after it, with these watchers."""
        backbone = self.streams.backbone
        with contextlib.ExitStack() as stack:
            for name, watcher in watchers.items():
                stack.callback(backbone.get_submodule(name).register_forward_pre_hook(watcher).remove)
            self._run(self.streams.full, until)

    def statistics(
        self, task: Task, layers: Mapping[str, QuantLinear | QuantConv2d]
    ) -> dict[str, InputStatistics | None]:
        """Statistics of the inputs of those layers that have a transform fitted to its inputs.

        `layers` are the layers of the task as they will quantize their inputs. A layer that no sample reached has None.
        """
        calls = -(-len(self.learning) // self.streams.batch_size)
        observers = {
            name: InputObserver(layer, calls)
            for name, layer in layers.items()
            if any(fit_of(one).statistics for one in layer.transforms)
        }
        self._watch(task, {name: observer.add for name, observer in observers.items()})
        return {name: observer.statistics() for name, observer in observers.items()}

    def moments(
        self, task: Task, layers: Mapping[str, QuantLinear | QuantConv2d], empty: Mapping[str, Moments]
    ) -> dict[str, Moments]:
        """Second moments of transformed and quantized inputs, added to `empty`; without layers that no sample reached.

        `layers` are the layers of the task, by name, as they will quantize their inputs. Raises UserError, with the
        layer's name, for inputs that are not finite.
        """
        backbone = self.streams.backbone

        latest = Latest()

        def adding(name: str) -> Callable[[Tensor], None]:
            layer, quantized, moments = backbone.get_submodule(name), layers[name], empty[name]
            kind = moments.in_full, kind_of_input(quantized, name)

            def columns(x: Tensor) -> Tensor:
                x = quantized.quantize_input(quantized.inputs(x)[-1])
                return columns_of(layer, alike(x) if moments.in_full else x)

            return lambda x: moments.add(latest.of(kind, x, columns))

        self._watch(task, {name: adding(name) for name in empty})
        for name, moments in empty.items():
            if not moments.sums.diagonal(dim1=1, dim2=2).isfinite().all():
                raise UserError(f"the input of layer {name} holds NaN or infinity: calibrate in --dtype fp32 or bf16")
        return {name: moments for name, moments in empty.items() if moments.tokens}

    def _run(self, stream: Stream, until: str) -> None:
        for batch in self.streams.batches(self.learning, f"{self.title}: inputs", self.bar):
            self.streams.run(stream, self.number, until, batch)

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
