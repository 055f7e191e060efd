"""Decide the codes of the layers of one task: fit, learn or solve, correct."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.budget import Held, bytes_a_weight, passes
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
from dmquant.calib.objectives import UnitData
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
    on_decided: Callable[[int, Sequence[Learner]], None] = lambda number, learners: None
    """Told the number of a block and its learners, once their codes are decided."""

    def decide(
        self, task: Task, finished: Mapping[str, QuantizedTensor], inputs: BlockInputs
    ) -> tuple[Learned, dict[str, QuantizedTensor]]:
        """Decide the codes of the layers of a task; returns how their learning ended, and the weights by layer.

        `finished` holds the weights of the block that are decided already. Weights have the shape of their layer's,
        (out, in, ...). Parts and transforms go to the layers' states. Layers of blocks that a window looks ahead at are
        decided anew in their turn.
        """
        streams, options, device = self.streams, self.options, self.streams.device
        number, title, bar = inputs.number, inputs.title, inputs.bar
        targets = streams.full.get(task.output)
        own_targets = targets is None
        if own_targets:
            targets = streams.outputs(streams.full, number, task.output, title, bar)
        with contextlib.ExitStack() as stack:
            decided = {name: self.states[name].with_weight(weight) for name, weight in finished.items()}
            for name, layer in decided.items():
                stack.enter_context(replaced_forward(self.states[name].layer, layer.forward))
            learners = self._learners(task, inputs)
            stack.enter_context(learning_layers(learners))
            if not options.compile:
                stack.enter_context(sharing_inputs(learners))
            enter_dtype(self.backbone, task.blocks, decided.values(), options, stack)
            objective = options.objective.definition.start(
                self._data(task, targets, number, device), options.objective.checked
            )
            learned, kept = learn(
                task.output,
                learners,
                objective,
                options,
                lambda step, loss: bar(step, options.iterations, title, f"loss {loss:.3f}"),
            )
            error = correct(
                learners,
                {name: rounded.values for name, rounded in kept.items()},
                learned.error,
                streams.ranges,
                lambda: inputs.run(task),
                lambda: held_out_error(learners, objective, kept, options),
            )
        if own_targets:
            targets.close()
        for learner in learners:
            state, quantized = self.states[learner.name], learner.quantized
            state.parts = {one.name: quantized.parts(one) for one in quantized.transforms}
            if learner.name in streams.blocks[number].layers:
                state.keep_transforms(state.parts)
        self.on_decided(number, learners)
        codes = {name: rounded.quantized() for name, rounded in kept.items()}
        return replace(learned, error=error), codes

    def layer_to_be(self, name: str) -> QuantLinear | QuantConv2d:
        """A quantized layer without weight, which quantizes its input if learning is to."""
        return self.states[name].without_weight(self.options.quantize_activations)

    def _data(self, task: Task, targets: Outputs, number: int, device: torch.device) -> UnitData:
        def that_counts(output: Any) -> Any:
            return output[..., self.counted[task.output]] if task.output in self.counted else output

        streams = self.streams
        return UnitData(
            run=lambda batch, generator: that_counts(
                streams.run(streams.quantized, number, task.output, batch, generator)
            ),
            target=lambda batch: that_counts(targets.read(batch, device)),
            learning=self.samples.learning,
            held_out=self.samples.held_out,
            overwrites=any(block.overwrites for block in streams.blocks if block.name in task.blocks),
        )

    def _learners(self, task: Task, inputs: BlockInputs) -> list[Learner]:
        """The layers of a task with their scales fitted and formats chosen."""
        states = {name: self.states[name] for name in task.layers}
        layers = {name: self.layer_to_be(name) for name in states}
        statistics = inputs.statistics(task, layers)
        weights = {
            name: fit_transforms(state.layer, state.plan, layers[name], statistics.get(name))
            for name, state in states.items()
        }
        learners = {}
        sizes = {name: self.moments.get(name, Held(0, 0)) for name in layers}
        held = bytes_a_weight(self.rounder.learns) * sum(weight.numel() for weight in weights.values())
        for names in passes(sizes, self.needed - held):
            device = self.streams.device
            collected = {
                name: self.rounder.moments_for(states[name].layer, states[name].plan, device) for name in names
            }
            collected = inputs.moments(task, layers, {name: one for name, one in collected.items() if one})
            for name in names:
                state, moments = states[name], collected.pop(name, None)
                learners[name] = self.rounder.start(state.layer, state.plan, layers[name], weights[name], moments)
        return [learners[name] for name in task.layers]


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
