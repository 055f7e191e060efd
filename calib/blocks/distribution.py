"""PD-Quant's distribution correction: inputs of a unit in full precision whose channels are spread as in all samples.

Liu et al., arXiv 2212.07048, section 3.3: inputs x are moved until the means and deviations of channels in the unit are
those that its batch norms keep from training, and not further from where they were than that takes. The norms of a
diffusion model keep none; here they are the means over all samples to learn from of such timesteps, by guidance branch.
Squared distances are relative to the mean squares of deviations and of inputs, and both count alike (the paper's are
absolute, with weights of their own).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import ranges_of
from dmquant.calib.blocks.outputs import Outputs, first_sample
from dmquant.calib.blocks.streams import Bar, Stream, Streams
from dmquant.calib.blocks.units import Task
from dmquant.calib.data.store import timesteps_of
from dmquant.calib.data.tree import flatten, unflatten

RANGES = 4  # of timesteps
RATE = 1e-3  # of Adam, in RMS of an input
_TINY = torch.finfo(torch.float32).tiny
Statistics = dict[str, Tensor]
"""Means and deviations of the channels of what each norm is given, (samples, branches, 2, channels) float32."""


@dataclass
class Correction:
    """Corrects the inputs of the unit of a task, which begins with block `number`, by `steps` steps a batch."""

    streams: Streams
    number: int
    task: Task
    steps: int

    def stream(self, learning: Sequence[int], title: str, bar: Bar) -> Stream:
        """The full-precision stream with the inputs of the samples `learning` corrected; to be closed by the caller.

        Other samples stay as they are; so do all where the unit has no norm. The first unit has none to correct: its
        inputs are latents.
        """
        streams, stream = self.streams, {}
        full = {name: outputs for name, outputs in streams.full.items() if self._is_before(name)}
        wanted = self._wanted(learning, title, bar) if full else {}
        others = [index for index in streams.full_of if index not in set(learning)]
        for samples in (learning, others):
            for batch in streams.batches(samples, f"{title}: distribution", bar):
                given = {name: outputs.read(batch, streams.device) for name, outputs in full.items()}
                if wanted and samples is learning:
                    given = self._moved(batch, given, {name: of[self._ranges(batch)] for name, of in wanted.items()})
                for name, output in given.items():
                    if name not in stream:
                        stream[name] = Outputs(streams.full_of, first_sample(output, len(batch)), streams.budget)
                    stream[name].write(batch, output)
        return stream

    def _is_before(self, name: str) -> bool:
        return name in [block.name for block in self.streams.blocks[: self.number]]

    def _ranges(self, batch: Sequence[int]) -> Tensor:
        return ranges_of(timesteps_of(self.streams.store, batch), RANGES)

    @torch.no_grad()
    def _wanted(self, learning: Sequence[int], title: str, bar: Bar) -> Statistics:
        """Mean statistics by range of timesteps, (RANGES, branches, 2, channels), for every norm that the unit runs."""
        sums: Statistics = {}
        counts = torch.zeros(RANGES, dtype=torch.float32)
        for batch in self.streams.batches(learning, f"{title}: statistics", bar):
            ranges = self._ranges(batch)
            counts += ranges.bincount(minlength=RANGES)
            for name, found in self._statistics(self.streams.full, batch).items():
                zeros = found.new_zeros(RANGES, *found.shape[1:])
                sums[name] = sums.get(name, zeros).index_add(0, ranges.to(found.device), found)
        return {name: total / counts.clamp(min=1).view(-1, 1, 1, 1).to(total) for name, total in sums.items()}

    def _moved(self, batch: Sequence[int], given: dict[str, Any], wanted: Statistics) -> dict[str, Any]:
        """Outputs of the blocks before the unit for a batch, moved towards the statistics that are wanted."""
        skeleton, leaves = flatten(given)
        exact = [leaf.tensor for leaf in leaves]
        places = [place for place, tensor in enumerate(exact) if tensor.is_floating_point()]
        sizes = [exact[place].float().square().mean().sqrt() for place in places]
        moves = [torch.zeros_like(exact[place], dtype=torch.float32, requires_grad=True) for place in places]
        optimizer, least, best = torch.optim.Adam(moves, lr=RATE), float("inf"), given
        for step in range(self.steps + 1):
            tensors = list(exact)
            for place, size, move in zip(places, sizes, moves, strict=True):
                tensors[place] = (exact[place] + size * move).to(exact[place].dtype)
            tree = unflatten(skeleton, tensors)
            with torch.enable_grad():
                loss = self._distance(tree, batch, wanted) + sum(move.square().mean() for move in moves)
            if loss.item() < least:
                least, best = loss.item(), unflatten(skeleton, [tensor.detach() for tensor in tensors])
            if step < self.steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return best

    def _distance(self, given: dict[str, Any], batch: Sequence[int], wanted: Statistics) -> Tensor:
        """Of statistics from those wanted, squared and summed over norms, over the mean square of the deviations."""
        now = {name: _Given(output) for name, output in given.items()}
        distances = [
            (found - wanted[name]).square().mean() / wanted[name][:, :, 1].square().mean().clamp(min=_TINY)
            for name, found in self._statistics(now, batch).items()
        ]
        return torch.stack(distances).sum()

    def _statistics(self, stream: Mapping[str, Any], batch: Sequence[int]) -> Statistics:
        found: Statistics = {}
        with self._watching(lambda name, statistics: found.update({name: statistics}), len(batch)):
            self.streams.run(stream, self.number, self.task.output, batch)
        return found

    @contextlib.contextmanager
    def _watching(self, tell: Callable[[str, Tensor], None], samples: int) -> Iterator[None]:
        """Tell what the norms of the unit's blocks are given, by name, until the block ends."""

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
                channels_last = args[0].float().movedim(1 if isinstance(norm, nn.GroupNorm) else -1, -1)
                rows = channels_last.unflatten(0, (samples, self.streams.store.rows, -1)).flatten(2, -2)
                tell(name, torch.stack([rows.mean(2), rows.var(2, correction=0).clamp(min=_TINY).sqrt()], 2))

            return hook

        with contextlib.ExitStack() as stack:
            for block in self.task.blocks:
                for name, module in self.streams.backbone.get_submodule(block).named_modules(prefix=block):
                    if type(module).__name__.endswith("Norm") and not any(module.children()):
                        stack.callback(module.register_forward_pre_hook(watch(name)).remove)
            yield


class _Given:
    """Stands for the outputs of a block, of which one batch is there."""

    def __init__(self, output: Any):
        self._output = output

    def read(self, batch: Sequence[int], device: torch.device) -> Any:
        return self._output
