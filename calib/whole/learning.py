"""Learn all layers of a backbone at once, end to end, from the codes that the march left.

The march decides blocks one after another, by nearest or solved roundings, and leaves of every layer its quantized form
in place, and on disk the float weight and what the solution wanted. From these the recipe's rounding method begins.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.codes import CodesFolder, tensors_of, weight_of
from dmquant.calib.blocks.decide import Samples, enter_dtype
from dmquant.calib.blocks.learn import Learned, learn, learning_layers
from dmquant.calib.blocks.midway import Midway
from dmquant.calib.blocks.once import sharing_inputs
from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.blocks.state import LayerState
from dmquant.calib.blocks.streams import Bar
from dmquant.calib.blocks.units import Block
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.rounder import Rounder
from dmquant.calib.objectives import SAME_INPUTS, UnitData, needs_of
from dmquant.calib.whole.budget import Needed, needed
from dmquant.calib.whole.teacher import Teacher, checkpointing
from dmquant.errors import UsageError
from dmquant.host.units import size_text
from dmquant.qtensor import QuantizedTensor
from dmquant.recipe import Learning
from dmquant.rounding import Rounded

TITLE = "all layers"


@dataclass
class Whole:
    """The learning of all layers of a backbone at once; made before the march, in full precision."""

    backbone: nn.Module
    blocks: Sequence[Block]
    samples: Samples
    rounder: Rounder
    options: Learning
    codes: CodesFolder
    """What the march leaves of the block of each number, then the state of the loop, then the codes learned."""
    needed: Needed
    recomputes: bool
    """Whether blocks keep their inputs alone for the backward pass, and compute the rest again."""
    taken: int
    """Bytes of memory that it takes."""
    importance: Sequence[float]
    """Of each sample, where the objective needs it."""
    teacher: Teacher | None = None
    """None where the codes learned are already there."""

    @classmethod
    def begin(
        cls,
        backbone: nn.Module,
        blocks: Sequence[Block],
        samples: Samples,
        rounder: Rounder,
        options: Learning,
        codes: CodesFolder,
        total: int,
        where: str,
        importance: Sequence[float],
    ) -> "Whole":
        """Begin, within `total` bytes; UsageError where they are too few, and for an objective that needs blocks.

        `where`: the memory meant, such as "GPU ".
        """
        if SAME_INPUTS in needs_of(options.objective):
            raise UsageError(
                f"learning.objective: {options.objective.method} compares a block with itself in full precision: "
                "learning.unit: model has the prediction alone, use mse"
            )
        if options.activation_drop or options.full_precision_inputs:
            raise UsageError(
                "learning.activation_drop and full_precision_inputs are of blocks: unit: model has neither"
            )
        takes = needed(backbone, blocks, options)
        taken, recomputes = takes.check(total, options.batch_size, where), takes.recomputes(total)
        return cls(backbone, blocks, samples, rounder, options, codes, takes, recomputes, taken, importance)

    def in_words(self) -> str:
        """A line on the memory that it takes."""
        how = "blocks compute their activations twice" if self.recomputes else "blocks keep their activations"
        return (
            f"{TITLE}: learned together in about {size_text(self.taken)} of memory, {size_text(self.needed.weights)} "
            f"of it for weights; {how}"
        )

    def predict(self, store: CalibrationStore, ranges: TimestepRanges, budget: Budget, bar: Bar) -> None:
        """Keep the predictions of full precision, which the backbone is in now, unless all is learned already."""
        if self.codes.load(len(self.blocks) + 1, TITLE) is None:
            samples = (*self.samples.learning, *self.samples.held_out)
            self.teacher = Teacher(
                self.backbone, store, samples, budget, batch_size=self.options.batch_size, ranges=ranges, bar=bar
            )

    def is_kept(self, number: int) -> bool:
        """Whether `keep` has kept what learning begins with of the block of this number."""
        return self.teacher is None or self.codes.load(number, self.blocks[number].name) is not None

    def keep(self, number: int, learners: Sequence[Learner]) -> None:
        """Keep on disk what learning begins with beside the codes: float weights, and what solutions wanted."""
        tensors = {f"{learner.name}.exact": learner.grid.weight for learner in learners}
        tensors |= {f"{one.name}.wanted": one.grid.wanted for one in learners if one.grid.wanted is not None}
        self.codes.save(number, self.blocks[number].name, tensors, {})

    def learn_(
        self,
        states: dict[str, LayerState],
        say: Callable[[str], None],
        bar: Callable[[str], AbstractContextManager[Bar]],
    ) -> dict[str, Any]:
        """Learn all layers, which are quantized now, and put what was learned in place.

        Returns what the march tells of a block: a name, seconds, and how the learning ended.
        """
        number, began = len(self.blocks) + 1, time.perf_counter()
        if found := self.codes.load(number, TITLE):
            tensors, facts = found
            for name in facts["errors"]:
                layer = states[name].layer
                self._put_in_place_(
                    states[name], weight_of(tensors, name, layer.weight_spec, layer.weight_shape), facts
                )
            say(f"{TITLE}: already there")
            return facts
        learners = self._learners(states)
        with bar(TITLE) as shown:
            learned, kept = self._learned(learners, say, shown)
        codes = {name: rounded.quantized() for name, rounded in kept.items()}
        facts = {
            "name": TITLE,
            "formats": {},
            "transforms": {},
            "tasks": [{"name": TITLE, **asdict(learned)}],
            "errors": {one.name: states[one.name].report.error * _change(one, kept[one.name]) for one in learners},
            "seconds": time.perf_counter() - began,
        }
        self.codes.save(number, TITLE, tensors_of(codes, {name: {} for name in codes}), facts)
        for name, weight in codes.items():
            self._put_in_place_(states[name], weight, facts)
        self.teacher.close()
        return facts

    def _learners(self, states: dict[str, LayerState]) -> list[Learner]:
        """The layers as the march left them, with their roundings begun."""
        learners = []
        for number, block in enumerate(self.blocks):
            tensors, _ = self.codes.load(number, block.name)
            for name in block.layers:
                layer = states[name].layer
                spec, scales, shape, device = layer.weight_spec, layer.scales, layer.weight_shape, layer.qweight.device
                grid = spec.grid_type(tensors[f"{name}.exact"].to(device), spec, scales, shape)
                if f"{name}.wanted" in tensors:
                    solution = spec.grid_type.decode(layer.qweight, scales.decode(), spec, grid.segments)
                    grid = replace(grid, solution=solution, wanted=tensors[f"{name}.wanted"].to(device))
                quantized = copy.copy(layer)
                if not self.options.quantize_activations:
                    quantized.activations = None
                rounding = self.rounder.method.start(grid, self.rounder.options)
                learners.append(Learner(name, layer, grid, rounding, quantized))
        return learners

    def _learned(
        self, learners: Sequence[Learner], say: Callable[[str], None], bar: Bar
    ) -> tuple[Learned, dict[str, Rounded]]:
        """How the learning of all layers ended, and the roundings kept."""
        options, teacher, names = self.options, self.teacher, [block.name for block in self.blocks]
        overwriting = [block.name for block in self.blocks if block.overwrites]
        data = UnitData(
            lambda batch, generator: teacher.predict(batch),
            teacher.target,
            self.samples.learning,
            self.samples.held_out,
            bool(overwriting),
            lambda batch, generator: (teacher.predict(batch),) * 2,
            teacher.target,
            lambda batch: torch.tensor([self.importance[index] for index in batch], dtype=torch.float32),
        )
        objective = options.objective.definition.start(data, options.objective.checked)
        progress = _Progress(options.iterations, say, bar)
        midway = Midway(self.codes, len(self.blocks), TITLE, options.checkpoint_every, progress.kept)
        with contextlib.ExitStack() as stack:
            stack.enter_context(learning_layers(learners))
            enter_dtype(self.backbone, names, (), options, stack)
            if self.recomputes:
                stack.enter_context(checkpointing(self.backbone, [one for one in names if one not in overwriting]))
            elif not options.compile:
                stack.enter_context(sharing_inputs(learners))
            return learn(TITLE, learners, objective, options, progress, midway)

    def _put_in_place_(self, state: LayerState, weight: QuantizedTensor, facts: dict[str, Any]) -> None:
        device, bias = state.layer.qweight.device, state.layer.bias
        scales = replace(weight.scales, stored=weight.scales.stored.to(device), base=_to(weight.scales.base, device))
        state.layer.load_quantized(replace(weight, codes=weight.codes.to(device), scales=scales), bias)
        state.report = replace(state.report, error=facts["errors"][state.name])


class _Progress:
    """Shows the steps on a bar, and says a line with the time to go when a state was kept."""

    def __init__(self, steps: int, say: Callable[[str], None], bar: Bar):
        self.steps, self.say, self.bar = steps, say, bar
        self.first: tuple[int, float] | None = None
        """The step first kept in this process, and when: resuming does not begin with the first step."""

    def __call__(self, step: int, loss: float) -> None:
        self.bar(step, self.steps, TITLE, f"loss {loss:.3f}")

    def kept(self, step: int) -> None:
        now = time.perf_counter()
        self.first = self.first or (step, now)
        done, to_go = step - self.first[0], self.steps - step
        left = f"; about {to_go * (now - self.first[1]) / done:.0f} s to go" if done and to_go else ""
        self.say(f"{TITLE}: step {step} of {self.steps} done and kept{left}")


def _change(learner: Learner, rounded: Rounded) -> float:
    """The squared error of the weight as learned over that of the weight as the march left it."""
    exact, before = learner.grid.weight, learner.grid.solution
    before = learner.grid.nearest if before is None else before
    lost = (before - exact).square().sum().item()
    return (rounded.values - exact).square().sum().item() / lost if lost else 1.0


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
