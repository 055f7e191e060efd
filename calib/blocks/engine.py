"""Calibrate a backbone block by block: fit scales, choose formats, learn roundings, each on what comes before it.

Two streams are carried from block to block: outputs as full precision gives them and as the quantized blocks before
give them. Every block is computed a fixed number of times, so cost grows with the number of blocks. After a block its
codes are on disk; a killed calibration reads them back and computes the same streams again.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import dmquant
from dmquant.activations import TimestepRanges
from dmquant.calib.blocks.budget import STATE, Held, check_budget, default_budget, passes, return_freed_memory
from dmquant.calib.blocks.codes import LAYOUT, CodesFolder, Parts, parts_of, tensors_of, weight_of
from dmquant.calib.blocks.inputs import BlockInputs
from dmquant.calib.blocks.learn import (
    DTYPES,
    Learned,
    UnitData,
    computing_in,
    held_out_error,
    learn,
    learning_layers,
)
from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.blocks.replay import replaced_forward, trace
from dmquant.calib.blocks.resolved import resolved_recipe
from dmquant.calib.blocks.streams import Bar, Streams
from dmquant.calib.blocks.units import Block, Task, find_blocks, tasks_of
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.activation_formats import choose_activation_formats
from dmquant.calib.layers.fitting import correct, fit_to_codes, fit_transforms
from dmquant.calib.layers.folding import folded_methods, folds_of, shared_factor
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import Moments, fit_grid, moments_for, needs_moments
from dmquant.calib.layers.ranges import check_timesteps, observe_ranges
from dmquant.convert import LayerPlan, LayerReport, plan, relative_error
from dmquant.errors import UsageError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import QuantizedTensor
from dmquant.recipe import Recipe
from dmquant.rounding import get_method
from dmquant.transforms import Transform, prepare_


@dataclass(frozen=True)
class Calibrated:
    """What a calibration made: the recipe with every choice filled in, and what became of layers and blocks."""

    recipe: Recipe
    layers: list[LayerReport]
    blocks: list[dict[str, Any]]
    """By block: name, seconds, formats of the layers, and how the learning of each task ended."""


def calibrate_(
    backbone: nn.Module,
    recipe: Recipe,
    store: CalibrationStore,
    *,
    blocks: Sequence[str],
    folder: Path,
    made_for: dict[str, Any],
    counted: Mapping[str, Tensor] = MappingProxyType({}),
    memory_budget: int | None = None,
    bar: Callable[[str], AbstractContextManager[Bar]],
    say: Callable[[str], None] = lambda line: None,
) -> Calibrated:
    """Replace the layers of `backbone` by quantized ones in place, as `recipe` says, calibrated on `store`.

    Args:
        backbone: in full precision, on its device; its forward is what `store` was captured from.
        blocks: names of its modules to calibrate one after another, as a model family lists them.
        folder: codes of finished blocks go to `folder`/blocks, activations that do not fit to `folder`/spill.
        made_for: what the codes depend on besides recipe and data, as JSON can hold it (hash of the weights, dtype).
        counted: layers some of whose output channels nothing reads: bool (channels,), True for those that enter the
            error where a unit ends in that layer.
        memory_budget: bytes for activations and learning; by default half of the memory that is free.
        bar: gives a progress bar, called as bar(done, total, what, speed).

    Raises UsageError where the recipe quantizes nothing, the data is too little or the budget too small, UserError for
    NaN or infinity, with the name of the layer; what is finished stays.
    """
    return _Engine(backbone, recipe, store, blocks, folder, made_for, counted, memory_budget, bar, say).run()


class _Engine:
    def __init__(
        self,
        backbone: nn.Module,
        recipe: Recipe,
        store: CalibrationStore,
        blocks: Sequence[str],
        folder: Path,
        made_for: dict[str, Any],
        counted: Mapping[str, Tensor],
        memory_budget: int | None,
        bar: Callable[[str], AbstractContextManager[Bar]],
        say: Callable[[str], None],
    ):
        self.backbone, self.recipe, self.store, self.bar, self.say = backbone, recipe, store, bar, say
        self.options = recipe.learning
        self.method = get_method(recipe.rounding.method)
        self.rounding_options = self.method.Options.model_validate(recipe.rounding.options)
        self.solving = self.rounding_options if self.method.NEEDS_MOMENTS else get_method("gptq").Options()
        self.device = next(backbone.parameters()).device
        by_step = sorted(range(len(store.samples)), key=lambda index: store.samples[index].step)
        self.learning = [index for index in by_step if not store.samples[index].held_out]
        self.held_out = [index for index in by_step if store.samples[index].held_out]
        if len(self.learning) < self.options.batch_size:
            raise UsageError(
                f"the calibration data has {len(self.learning)} samples to learn from, fewer than a mini-batch of "
                f"{self.options.batch_size}: calibrate on more prompts, or lower learning.batch_size in the recipe"
            )
        self.plans = {step.name: step for step in plan(backbone, recipe)}
        if not self.plans:
            raise UsageError(f"recipe '{recipe.name}' quantizes none of the layers of {type(backbone).__name__}")
        specs = [step.activations for step in self.plans.values() if step.activations]
        transforms = [transform for step in self.plans.values() for transform in step.transforms]
        counts = {count for one in transforms for count in (one.ranges(), one.observed_ranges())}
        self.ranges = TimestepRanges({spec.ranges for spec in specs if spec.ranges} | counts)
        if any(count > 1 for count in counts):
            check_timesteps(store)
        self.parts: dict[str, Parts] = {}
        self.input_scales: dict[str, Tensor] = {}
        self.input_formats: dict[str, str] = {}
        self.reports: list[LayerReport] = []
        depends_on = {
            "recipe": recipe.to_dict(),
            "data": store.key,
            "made_for": made_for,
            "dmquant": dmquant.__version__,
            "layout": LAYOUT,
            "counted": {name: channels.tolist() for name, channels in counted.items() if name in self.plans},
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self.codes = CodesFolder(folder / "blocks", key)
        self.spill, self.memory_budget = folder / "spill", memory_budget
        self.names = blocks
        self.counted = {name: channels.to(self.device) for name, channels in counted.items()}

    def run(self) -> Calibrated:
        backbone = self.backbone.requires_grad_(False).eval()
        one = self.store.batch([self.learning[0]], self.device)
        self.blocks = find_blocks(self.names, self.plans, lambda names: trace(backbone, one, names))
        total = default_budget() if self.memory_budget is None else self.memory_budget
        self.moments_bytes = self._bytes_of_moments()
        self.needed = check_budget(total, backbone, self.blocks, self.options, self.moments_bytes)
        budget = Budget(total - self.needed, self.spill)
        prepare_(backbone, {name: step.transforms for name, step in self.plans.items()})
        self._choose_activation_formats()
        self._observe_static_ranges()
        self.streams = Streams(backbone, self.blocks, self.store, self.ranges, budget, self.options)
        facts, learned_seconds = [], []
        for number, block in enumerate(self.blocks):
            title = f"block {number + 1} of {len(self.blocks)}: {block.name}"
            began = time.perf_counter()
            with self.bar(title) as bar:
                done = self._block(number, block, title, bar)
            return_freed_memory()
            seconds = time.perf_counter() - began
            facts.append(done)
            if done.pop("from_disk", False):
                self.say(f"{title}: already there")
                continue
            learned_seconds.append(seconds)
            left = len(self.blocks) - number - 1
            to_go = f"; about {left * sum(learned_seconds) / len(learned_seconds):.0f} s to go" if left else ""
            self.say(f"{title}: {_in_words(done['tasks'])} in {seconds:.0f} s{to_go}")
        self._never_called()
        return Calibrated(resolved_recipe(self.recipe, self.reports, self.input_formats), self.reports, facts)

    # One block

    def _block(self, number: int, block: Block, title: str, bar: Bar) -> dict[str, Any]:
        """Quantize one block in place and carry both streams past it."""
        began, streams = time.perf_counter(), self.streams
        inputs = BlockInputs(streams, number, self.learning, title, bar)
        tensors, facts = self.codes.load(number, block.name) or ({}, None)
        tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        folded = self._fold(block, tensors, inputs)
        streams.carry(streams.full, number, title, bar)
        if facts:
            for name in block.layers:
                shape, left = tuple(self.backbone.get_submodule(name).weight.shape), facts["transforms"][name]
                step = self._with_transforms(name, [one for one in self.plans[name].transforms if one.name in left])
                self.parts[name] = parts_of(tensors, name, step.transforms)
                spec = step.weights.with_format(dmquant.get_format(facts["formats"][name]))
                self._swap(weight_of(tensors, name, spec, shape), name)
            facts["from_disk"] = True
        else:
            tasks, values = [], {}
            for task in tasks_of(self.blocks, number, self.options):
                learned, kept = self._task(task, values, inputs)
                values |= {name: kept[name] for name in task.layers if name in block.layers}
                tasks.append({"name": task.output, **asdict(learned)})
            for name in block.layers:
                self._swap(values[name], name)
            formats = {name: values[name].spec.fmt.name for name in block.layers}
            left = {name: [one.name for one in self.plans[name].transforms] for name in block.layers}
            facts = {"name": block.name, "formats": formats, "transforms": left, "tasks": tasks}
            facts["seconds"] = time.perf_counter() - began
            self.codes.save(number, block.name, tensors_of(values, self.parts) | folded, facts)
        streams.carry(streams.quantized, number, title, bar)
        streams.drop(number)
        return facts

    def _fold(self, block: Block, tensors: Mapping[str, Tensor], inputs: BlockInputs) -> dict[str, Tensor]:
        """Fold transforms of a block's layers by the factors among its `tensors` on disk, or else by its inputs.

        Returns the factors by their keys.
        """
        factors = {}
        for method in folded_methods(self.plans):
            folds = folds_of(self.backbone, block.name, self.plans, method)
            if tensors:
                factors |= {fold.key: tensors[fold.key] for fold in folds}
            else:
                readers = tuple(name for fold in folds for name in fold.readers)
                layers = {name: self._quantized_layer(name) for name in readers}
                statistics = inputs.statistics(Task(block.name, readers, (block.name,)), layers)
                factors |= {fold.key: shared_factor(fold, self.plans, layers, statistics) for fold in folds}
            for fold in folds:
                fold.apply_(factors[fold.key], self.plans)
        return factors

    def _task(
        self, task: Task, finished: dict[str, QuantizedTensor], inputs: BlockInputs
    ) -> tuple[Learned, dict[str, QuantizedTensor]]:
        """Decide the codes of the layers of one task; `finished` are those of the block that are decided already."""
        streams, number, title, bar = self.streams, inputs.number, inputs.title, inputs.bar
        targets = streams.full.get(task.output)
        own_targets = targets is None
        if own_targets:
            targets = streams.outputs(streams.full, number, task.output, title, bar)
        with contextlib.ExitStack() as stack:
            decided = {name: self._quantized_layer(name, quantized) for name, quantized in finished.items()}
            for name, layer in decided.items():
                stack.enter_context(replaced_forward(self.backbone.get_submodule(name), layer.forward))
            learners = self._learners(task, inputs)
            stack.enter_context(learning_layers(learners))
            for layer in decided.values():
                stack.enter_context(computing_in(layer, DTYPES[self.options.dtype]))
            if self.options.compile:
                torch._dynamo.reset()  # every unit is a function of its own: together they pass its limit of variants
            for name in task.blocks:
                module = self.backbone.get_submodule(name)
                stack.enter_context(computing_in(module, DTYPES[self.options.dtype]))
                if self.options.compile:
                    stack.enter_context(replaced_forward(module, torch.compile(module.forward)))
            data = UnitData(
                run=lambda batch, generator: self._counted(
                    task, streams.run(streams.quantized, number, task.output, batch, generator)
                ),
                target=lambda batch: self._counted(task, targets.read(batch, self.device)),
                learning=self.learning,
                held_out=self.held_out,
            )
            learned, kept = learn(
                task.output,
                learners,
                data,
                self.options,
                lambda step, loss: bar(step, self.options.iterations, title, f"loss {loss:.3f}"),
            )
            error = correct(
                learners,
                {name: rounded.values for name, rounded in kept.items()},
                learned.error,
                self.ranges,
                lambda: inputs.run(task),
                lambda: held_out_error(learners, data, kept, self.options),
            )
            learned = replace(learned, error=error)
        for learner in learners:
            quantized = learner.quantized
            self.parts[learner.name] = {one.name: quantized.parts(one) for one in quantized.transforms}
            if learner.name in self.blocks[number].layers:  # what looks ahead is decided anew in its turn
                self._with_transforms(learner.name, quantized.transforms)
        if own_targets:
            targets.close()
        return learned, {name: rounded.quantized() for name, rounded in kept.items()}

    def _counted(self, task: Task, output: Any) -> Any:
        """What of the output of a task enters its error."""
        return output[..., self.counted[task.output]] if task.output in self.counted else output

    def _learners(self, task: Task, inputs: BlockInputs) -> list[Learner]:
        """The layers of a task with their scales fitted and formats chosen."""
        layers = {name: self._quantized_layer(name) for name in task.layers}
        statistics = inputs.statistics(task, layers)
        weights = {
            name: fit_transforms(self.backbone.get_submodule(name), self.plans[name], layer, statistics.get(name))
            for name, layer in layers.items()
        }
        learners = {}
        sizes = {name: self.moments_bytes.get(name, Held(0, 0)) for name in layers}
        for names in passes(sizes, self.needed - STATE * sum(weight.numel() for weight in weights.values())):
            empty = {name: moments for name in names if (moments := self._moments_for(name, self.device))}
            moments = inputs.moments(task, layers, empty)
            for name in names:
                learners[name] = self._learner(name, weights[name], layers[name], moments.pop(name, None))
        return [learners[name] for name in task.layers]

    def _learner(self, name: str, weight: Tensor, quantized: nn.Module, moments: Moments | None) -> Learner:
        """A layer with the grid of its (transformed) weight fitted and its rounding started, or solved."""
        method, options = self.method, self.rounding_options
        weight = fit_to_codes(self.plans[name], quantized, weight, moments, method, self.solving)
        grid = fit_grid(weight, self._called(self.plans[name], moments is not None), moments, options)
        if not method.NEEDS_MOMENTS:
            rounding = method.start(grid, options)
        elif moments is None or not moments.in_full:
            rounding = get_method("nearest").start(grid, None)
        else:
            rounding = method.start(grid, options, moments.blocks())
        return Learner(name, self.backbone.get_submodule(name), grid, rounding, quantized)

    def _moments_for(self, name: str, device: torch.device) -> Moments | None:
        layer = self.backbone.get_submodule(name)
        return moments_for(layer, self.plans[name], self.method, self.solving, device)

    def _bytes_of_moments(self) -> dict[str, Held]:
        """Of the layers that are solved by their moments."""
        found = {name: self._moments_for(name, torch.device("meta")) for name in self.plans}
        return {
            name: Held(moments.sums.nbytes, moments.sums[0].nbytes)
            for name, moments in found.items()
            if moments is not None and moments.in_full
        }

    # Layers

    def _choose_activation_formats(self) -> None:
        open_ = {name: step for name, step in self.plans.items() if step.activation_candidates}
        if not open_:
            return
        place = len(self.blocks), "activation formats"  # behind the blocks: a continued calibration has the same ones
        if found := self.codes.load(*place):
            self.input_formats = found[1]
        else:
            with self.bar(place[1]) as bar:
                chosen = choose_activation_formats(self.backbone, open_, self.store, self.options.batch_size, bar)
            self.input_formats = {name: fmt.name for name, fmt in chosen.items()}
            self.codes.save(*place, {}, self.input_formats)
        for name, step in open_.items():
            activations = replace(step.activations, fmt=dmquant.get_format(self.input_formats[name]))
            self.plans[name] = replace(step, activations=activations, activation_candidates=())

    def _observe_static_ranges(self) -> None:
        specs = {name: step.activations for name, step in self.plans.items() if step.activations}
        if any(spec.ranges for spec in specs.values()):
            with self.bar("activation ranges") as bar:
                self.input_scales = observe_ranges(self.backbone, specs, self.store, self.options.batch_size, bar)

    def _quantized_layer(self, name: str, weight: QuantizedTensor | None = None) -> nn.Module:
        """The quantized layer to be; without `weight` it can only quantize inputs."""
        layer, step = self.backbone.get_submodule(name), self.plans[name]
        spec = step.weights if weight is None else weight.spec
        quantized = QUANTIZED[type(layer)].like(layer, spec, step.activations, "meta", step.transforms)
        if weight is not None:
            quantized.load_quantized(weight, layer.bias, self.input_scales.get(name))
            quantized.load_parts(self.parts.get(name, {}))
        elif quantized.is_static:
            quantized.load_input_scale(self.input_scales[name])
        quantized.timestep_ranges = self.ranges
        if weight is None and not self.options.quantize_activations:
            quantized.activations = None
        return quantized.train(layer.training)

    def _with_transforms(self, name: str, transforms: Iterable[Transform]) -> LayerPlan:
        """The plan of a layer, from now on with these transforms."""
        self.plans[name] = replace(self.plans[name], transforms=tuple(transforms))
        return self.plans[name]

    def _swap(self, weight: QuantizedTensor, name: str) -> None:
        layer, quantized = self.backbone.get_submodule(name), self._quantized_layer(name, weight)
        self.plans[name] = replace(self.plans[name], weights=weight.spec, candidates=())
        self.reports.append(LayerReport(self.plans[name], relative_error(layer.weight, quantized)))
        self.backbone.set_submodule(name, quantized)

    def _called(self, step: LayerPlan, seen: bool) -> LayerPlan:
        """The plan of a layer that has no moments: by weight error, in the recipe's own format."""
        if seen or not needs_moments(step):
            return step
        return replace(step, weights=replace(step.weights, scale="mse"), candidates=())

    def _never_called(self) -> None:
        """Layers outside of all blocks that the forward pass does not use."""
        done = {report.plan.name for report in self.reports}
        for name in [name for name in self.plans if name not in done]:
            layer, quantized = self.backbone.get_submodule(name), self._quantized_layer(name)
            weight = fit_transforms(layer, self.plans[name], quantized, None)
            weight = fit_to_codes(self.plans[name], quantized, weight, None, self.method, self.solving)
            self.parts[name] = {one.name: quantized.parts(one) for one in quantized.transforms}
            grid = fit_grid(weight, self._called(self.plans[name], False), None)
            self._swap(QuantizedTensor.of(grid, grid.nearest), name)


def _in_words(tasks: list[dict[str, Any]]) -> str:
    ratio = sum(task["error"] / max(task["nearest_error"], 1e-30) for task in tasks) / len(tasks)
    undecided = max(task["undecided"] for task in tasks)
    return f"held-out error {ratio:.2f} of nearest rounding, {undecided:.1%} undecided"
