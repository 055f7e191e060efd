"""Decide the codes of the layers of one task: fit, learn or solve, correct."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.budget import Held, bytes_a_weight, passes
from dmquant.calib.blocks.carried import Carried
from dmquant.calib.blocks.distribution import Correction
from dmquant.calib.blocks.inputs import BlockInputs
from dmquant.calib.blocks.learn import (
    DTYPES,
    Learned,
    computing_in,
    held_out_error,
    learn,
    learning_layers,
)
from dmquant.calib.blocks.once import sharing_inputs
from dmquant.calib.blocks.outputs import Outputs
from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.blocks.state import LayerState
from dmquant.calib.blocks.streams import Streams
from dmquant.calib.blocks.units import Task
from dmquant.calib.layers.correction import correct
from dmquant.calib.layers.fitting import fit_transforms
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.rounder import Rounder
from dmquant.calib.objectives import SAME_INPUTS, UnitData, needs_of
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.qtensor import QuantizedTensor
from dmquant.recipe import Learning


@dataclass(frozen=True)
class Samples:
    """Indices into the calibration data, by step of the schedule: those to learn from, and those held out."""

    learning: Sequence[int]
    held_out: Sequence[int]


@dataclass
class Decider:
    """Decides the codes of one task after another; its fields are shared by all tasks of a backbone."""

    backbone: nn.Module
    states: dict[str, LayerState]
    streams: Streams
    samples: Samples
    rounder: Rounder
    options: Learning
    counted: Mapping[str, Tensor]
    """Layers some of whose output channels nothing reads: bool (channels,), True for those that count."""
    moments: Mapping[str, Held]
    needed: int
    """Bytes that are set aside for a task."""
    carried: Carried
    importance: Sequence[float] = ()
    """Of each sample, 1 on average over those to learn from, where the objective needs it."""
    on_decided: Callable[[int, Sequence[Learner]], None] = lambda number, learners: None
    """Told the number of a block and its learners, once their codes are decided."""

    def decide(
        self, task: Task, finished: Mapping[str, QuantizedTensor], inputs: BlockInputs
    ) -> tuple[Learned, dict[str, QuantizedTensor]]:
        """Decide the codes of the layers of a task; returns how their learning ended, and the weights by layer.

        `finished` holds the weights of the block that are decided already. Weights have the shape of their layer's,
        (out, in, ...). Parts and transforms go to the layers' states. Layers that the task holds go on in the next one.
        """
        streams, options = self.streams, self.options
        number, title, bar = inputs.number, inputs.title, inputs.bar
        with contextlib.ExitStack() as stack:
            if options.distribution_steps and self.rounder.method.LEARNS:
                correction = Correction(streams, number, task, options.distribution_steps)
                stack.enter_context(streams.replacing_full(correction.stream(self.samples.learning, title, bar)))
            targets = streams.full.get(task.output)
            if targets is None:
                targets = streams.outputs(streams.full, number, task.output, title, bar)
                stack.callback(targets.close)
            there = {name: self.states[name].with_weight(weight) for name, weight in finished.items()}
            for name, layer in there.items():
                stack.enter_context(replaced_forward(self.states[name].layer, layer.forward))
            same_inputs = None
            if SAME_INPUTS in needs_of(options.objective):
                same_inputs = streams.outputs(streams.quantized, number, task.output, title, bar)
                stack.callback(same_inputs.close)
            learners = self._learners(task, inputs)
            stack.enter_context(learning_layers(learners))
            if not options.compile:
                stack.enter_context(sharing_inputs(learners))
            enter_dtype(self.backbone, task.blocks, there.values(), options, stack)
            objective = options.objective.definition.start(
                self._data(task, learners, targets, same_inputs, number), options.objective.checked
            )
            learned, kept = learn(
                task.output,
                learners,
                objective,
                options,
                lambda step, loss: bar(step, options.iterations, title, f"loss {loss:.3f}"),
            )
            decided = [learner for learner in learners if not learner.held]
            error = correct(
                decided,
                {name: rounded.values for name, rounded in kept.items()},
                learned.error,
                streams.ranges,
                lambda: inputs.run(task),
                lambda: held_out_error(decided, objective, kept, options),
            )
        for learner in learners:
            if learner.held:
                self.carried.learners[learner.name] = replace(learner, held=False, goes_on=True)
                continue
            state, quantized = self.states[learner.name], learner.quantized
            state.parts = {one.name: quantized.parts(one) for one in quantized.transforms}
            state.keep_transforms(state.parts)
        self.on_decided(number, [learner for learner in learners if not learner.held])
        codes = {name: rounded.quantized() for name, rounded in kept.items()}
        return replace(learned, error=error), codes

    def layer_to_be(self, name: str) -> QuantLinear | QuantConv2d:
        """A quantized layer without weight, which quantizes its input if learning is to."""
        return self.states[name].without_weight(self.options.quantize_activations)

    def _data(
        self, task: Task, learners: Sequence[Learner], targets: Outputs, same_inputs: Outputs | None, number: int
    ) -> UnitData:
        streams, following = self.streams, self.streams.blocks[number:] if self.streams.predictions else ()

        def that_counts(output: Any) -> Any:
            return output[..., self.counted[task.output]] if task.output in self.counted else output

        def draw(generator: torch.Generator | None) -> None:
            for learner in learners:
                learner.drawing = generator

        def run(batch: Sequence[int], generator: torch.Generator | None) -> Any:
            draw(generator)
            return that_counts(streams.run(streams.quantized, number, task.output, batch, generator))

        def predict(batch: Sequence[int], generator: torch.Generator | None) -> tuple[Any, Tensor]:
            draw(generator)
            output, prediction = streams.predict(number, task.output, batch, generator)
            return that_counts(output), prediction

        def importance(batch: Sequence[int]) -> Tensor:
            return torch.tensor([self.importance[index] for index in batch], dtype=torch.float32)

        return UnitData(
            run,
            lambda batch: that_counts(targets.read(batch, streams.device)),
            self.samples.learning,
            self.samples.held_out,
            any(block.overwrites for block in streams.blocks if block.name in task.blocks or block in following),
            predict if streams.predictions else None,
            (lambda batch: streams.predictions.read(batch, streams.device)) if streams.predictions else None,
            importance if self.importance else None,
            (lambda batch: that_counts(same_inputs.read(batch, streams.device))) if same_inputs else None,
        )

    def _learners(self, task: Task, inputs: BlockInputs) -> list[Learner]:
        """The layers of a task with their scales fitted and formats chosen, or as the window before left them."""
        learners = {name: self.carried.learners.pop(name) for name in task.layers if name in self.carried.learners}
        states = {name: self.states[name] for name in task.layers if name not in learners}
        layers = {name: self.layer_to_be(name) for name in states}
        statistics = inputs.statistics(task, layers)
        weights = {
            name: fit_transforms(state.layer, state.plan, layers[name], statistics.get(name))
            for name, state in states.items()
        }
        sizes = {name: self.moments.get(name, Held(0, 0)) for name in layers}
        count = sum(self.states[name].layer.weight.numel() for name in task.layers)
        held = bytes_a_weight(self.rounder.learns) * count
        for names in passes(sizes, self.needed - held):
            device = self.streams.device
            collected = {
                name: self.rounder.moments_for(states[name].layer, states[name].plan, device) for name in names
            }
            collected = inputs.moments(task, layers, {name: one for name, one in collected.items() if one})
            for name in names:
                state, moments = states[name], collected.pop(name, None)
                learners[name] = self.rounder.start(state.layer, state.plan, layers[name], weights[name], moments)
        dropped, held = self.options.activation_drop, set(task.held)
        return [replace(learners[name], held=name in held, dropped=dropped) for name in task.layers]


def enter_dtype(
    backbone: nn.Module,
    blocks: Iterable[str],
    decided: Iterable[nn.Module],
    options: Learning,
    stack: contextlib.ExitStack,
) -> None:
    """Let blocks, and decided layers in them, compute as the recipe's learning says, until `stack` ends."""
    dtype, compiled = DTYPES[options.dtype], options.compile
    for layer in decided:
        stack.enter_context(computing_in(layer, dtype))
    if compiled:
        torch._dynamo.reset()  # every unit is a function of its own: together they pass its limit of variants
    for name in blocks:
        module = backbone.get_submodule(name)
        stack.enter_context(computing_in(module, dtype))
        if compiled:
            stack.enter_context(replaced_forward(module, torch.compile(module.forward)))
