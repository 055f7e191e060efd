"""Calibrate a backbone block by block: fit scales, choose formats, learn roundings, each on what comes before it.

Two streams are carried from block to block: outputs as full precision gives them, of held-out samples alone where no
more are needed, and as the quantized blocks before give them. Every block is computed a fixed number of times, so cost
grows with the number of blocks. After a block its codes are on disk; a killed calibration reads them back and computes
the same streams again.
"""

import importlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import dmquant
from dmquant.calib.blocks.block import FROM_DISK, calibrate_block_
from dmquant.calib.blocks.budget import Held, check_budget
from dmquant.calib.blocks.carried import Carried
from dmquant.calib.blocks.codes import LAYOUT, CodesFolder, meaning_of
from dmquant.calib.blocks.decide import Decider, Samples
from dmquant.calib.blocks.input_specs import choose_formats_, fit_static_scales_
from dmquant.calib.blocks.inputs import BlockInputs
from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.blocks.resident import Resident
from dmquant.calib.blocks.resolved import resolved_recipe
from dmquant.calib.blocks.state import LayerState, plan_layers, plans_of
from dmquant.calib.blocks.streams import Bar, Streams
from dmquant.calib.blocks.trace import trace
from dmquant.calib.blocks.units import check_window, find_blocks, tasks_of
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.fitting import fit_transforms
from dmquant.calib.layers.folding import folded_methods
from dmquant.calib.layers.rounder import Rounder
from dmquant.calib.objectives import IMPORTANCE, TAIL, needs_of
from dmquant.convert import LayerReport
from dmquant.errors import UsageError
from dmquant.host.files import json_sha256
from dmquant.host.memory import default_budget, new_garbage_only, return_freed_memory
from dmquant.qtensor import QuantizedTensor
from dmquant.recipe import Recipe
from dmquant.settings import Objective
from dmquant.transforms import fold_first_

WHOLE = "dmquant.calib.whole.learning"  # where all layers are learned at once; by name alone, since it stands above


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration: the recipe with every choice filled in, and reports of layers and blocks."""

    recipe: Recipe
    layers: list[LayerReport]
    blocks: list[dict[str, Any]]
    """For each block its name, seconds, formats of the layers, and how the learning of each task ended."""


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
    device: torch.device | None = None,
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
        memory_budget: bytes for activations and learning; by default half of the memory that is free. On a GPU as much
            of its memory for learning, and as much of the CPU's for activations between blocks.
        device: where to compute with a backbone that is in host memory: on the device is the block that is calibrated
            (`Resident`), or all of it where the recipe looks at all. In the end the backbone is on the device.
        bar: gives a progress bar, called as bar(done, total, what, speed).

    Raises UsageError where the recipe quantizes nothing, the data is too little or the budget too small, UserError for
    NaN or infinity, with the name of the layer; what is finished stays.
    """
    backbone.requires_grad_(False).eval()
    rounder, options = Rounder.of(recipe), recipe.learning
    if options.unit == "window" and not rounder.method.LEARNS:
        options = options.model_copy(update={"unit": "block"})  # nothing would go on from one window to the next
    if options.unit == "model":  # in the march nothing is learned
        options = options.model_copy(update={"unit": "block", "objective": Objective()})
    samples, needs = _samples(store, options.batch_size), needs_of(options.objective)
    states = plan_layers(backbone, recipe, store)
    placed = [name for name in blocks if any(layer.startswith(f"{name}.") for layer in states)]
    resident = Resident(backbone, () if _needs_whole(recipe, states) else placed, device)
    device = resident.device
    one = store.batch([samples.learning[0]], device)
    in_order = find_blocks(blocks, states, lambda names: trace(backbone, one, names, resident.as_called))
    check_window(in_order, options)
    moments = _bytes_of_moments(rounder, states)
    total = default_budget(device) if memory_budget is None else memory_budget
    where = "GPU " if device.type == "cuda" else ""
    needed = check_budget(total, backbone, in_order, options, rounder.learns, moments, where, TAIL in needs)
    whole = None
    counted = {name: channels for name, channels in counted.items() if name in states}
    key = _key(recipe, store, made_for, counted)
    codes = CodesFolder(folder / "blocks", key)
    if rounder.later:
        begin = importlib.import_module(WHOLE).Whole.begin
        of_whole = CodesFolder(folder / "whole", key)
        importance = _importance(samples, needs_of(recipe.learning.objective), store)
        whole = begin(backbone, in_order, samples, rounder, recipe.learning, of_whole, total, where, importance)
        needed = max(needed, whole.taken)
        say(whole.in_words())

    with resident.in_host_memory():
        fold_first_(backbone, {name: state.plan.transforms for name, state in states.items()})
    choose_formats_(backbone, states, store, options.batch_size, codes, len(in_order), bar)
    fit_static_scales_(backbone, states, store, options.batch_size, bar)

    held = (memory_budget or default_budget()) if device.type == "cuda" else total - needed  # outputs are on the CPU
    ranges = next(iter(states.values())).ranges
    full_of = _full_precision_of(samples, rounder, states)
    budget = Budget(held, folder / "spill")
    streams = Streams(backbone, in_order, store, ranges, budget, options, full_of)
    if TAIL in needs:
        with bar("predictions") as shown:
            streams.predictions = streams.predict_in_full("predictions: full precision", shown)
    counted = {name: channels.to(device) for name, channels in counted.items()}
    carried = Carried(codes, [block.name for block in in_order], states)
    decider = Decider(
        backbone,
        states,
        streams,
        samples,
        rounder,
        options,
        counted,
        moments,
        needed,
        carried,
        _importance(samples, needs, store),
    )
    if whole:
        decider.on_decided = whole.keep
        with bar("predictions") as shown:
            whole.predict(store, ranges, budget, shown)
        for number in range(len(in_order)):
            if not whole.is_kept(number):
                codes.drop(number)
    facts, learned_seconds = [], []
    with new_garbage_only():
        for number, block in enumerate(in_order):
            title = f"block {number + 1} of {len(in_order)}: {block.name}"
            began = time.perf_counter()
            computing = {name for task in tasks_of(in_order, number, options) for name in task.blocks} | {block.name}
            with bar(title) as shown, resident.only(computing):
                facts.append(
                    calibrate_block_(decider, codes, BlockInputs(streams, number, samples.learning, title, shown))
                )
            return_freed_memory()
            if why := facts[-1].pop(FROM_DISK, None):
                say(f"{title}: {why}")
                continue
            learned_seconds.append(time.perf_counter() - began)
            say(f"{title}: {_in_words(facts[-1]['tasks'], learned_seconds, len(in_order) - number - 1)}")
    resident.end()
    if whole:
        facts.append(whole.learn_(states, say, bar))
    called = [name for block in in_order for name in block.layers]
    never_called = [name for name in states if name not in called]
    for name in never_called:
        _round_without_data_(states[name], rounder)
    reports = [states[name].report for name in (*called, *never_called)]
    plans = [state.plan for state in states.values() if state.plan.activation_candidates]
    input_formats = {step.name: step.activations.fmt.name for step in plans}
    return Calibrated(resolved_recipe(recipe, reports, input_formats), reports, facts)


def _samples(store: CalibrationStore, batch_size: int) -> Samples:
    """Indices of the samples, sorted by step; UsageError for fewer to learn from than a mini-batch has."""
    by_step = sorted(range(len(store.samples)), key=lambda index: store.samples[index].step)
    learning = [index for index in by_step if not store.samples[index].held_out]
    if len(learning) < batch_size:
        raise UsageError(
            f"the calibration data has {len(learning)} samples to learn from, fewer than a mini-batch of "
            f"{batch_size}: calibrate on more prompts, or lower learning.batch_size in the recipe"
        )
    return Samples(learning, [index for index in by_step if store.samples[index].held_out])


def _needs_whole(recipe: Recipe, states: Mapping[str, LayerState]) -> bool:
    """Whether calibration runs all of a backbone more than once, or keeps what it learns of a block with its layers."""
    plans = plans_of(states).values()
    of_inputs = any(plan.activation_candidates or (plan.activations and plan.activations.ranges) for plan in plans)
    return of_inputs or recipe.learning.unit == "model" or TAIL in needs_of(recipe.learning.objective)


def _importance(samples: Samples, needs: Collection[str], store: CalibrationStore) -> list[float]:
    """The importance of every sample of the store, 1 on average over those to learn from; none where nothing needs it.

    Raises UsageError where the data was captured without it.
    """
    if IMPORTANCE not in needs:
        return []
    if store.weights is None:
        raise UsageError(
            "learning.objective weighs steps by their importance, which this calibration data was captured without: "
            "capture it anew, or use learning.objective: mse"
        )
    of_samples = [store.weights[sample.step] for sample in store.samples]
    mean = fmean(of_samples[index] for index in samples.learning)
    return [weight / mean for weight in of_samples]


def _full_precision_of(samples: Samples, rounder: Rounder, states: dict[str, LayerState]) -> Sequence[int]:
    """The samples whose block outputs are needed in full precision: to judge by, to learn from, or to fold by."""
    if rounder.learns or folded_methods(plans_of(states)):
        return range(len(samples.learning) + len(samples.held_out))
    return samples.held_out


def _key(recipe: Recipe, store: CalibrationStore, made_for: dict[str, Any], counted: Mapping[str, Tensor]) -> str:
    """Fingerprint of all that codes depend on."""
    depends_on = {
        "recipe": meaning_of(recipe),
        "data": store.key,
        "made_for": made_for,
        "dmquant": dmquant.__version__,
        "layout": LAYOUT,
        "counted": {name: channels.tolist() for name, channels in counted.items()},
    }
    return json_sha256(depends_on)


def _bytes_of_moments(rounder: Rounder, states: Mapping[str, LayerState]) -> dict[str, Held]:
    """Bytes of the moments of each layer that is solved by them."""
    empty = {name: rounder.moments_for(one.layer, one.plan, torch.device("meta")) for name, one in states.items()}
    return {
        name: Held(moments.sums.nbytes, moments.sums[0].nbytes)
        for name, moments in empty.items()
        if moments is not None and moments.in_full
    }


def _round_without_data_(state: LayerState, rounder: Rounder) -> None:
    """Quantize a layer outside of all blocks that the forward pass does not use."""
    quantized = state.without_weight()
    weight = fit_transforms(state.layer, state.plan, quantized, None)
    grid = rounder.start(state.layer, state.plan, quantized, weight, None).grid
    state.parts = {one.name: quantized.parts(one) for one in quantized.transforms}
    state.put_in_place_(QuantizedTensor.of(grid, grid.nearest))


def _in_words(tasks: Sequence[dict[str, Any]], seconds: Sequence[float], left: int) -> str:
    """A line on a finished block: its error, its time, and the time to go; `left` blocks follow."""
    ratio = sum(task["error"] / max(task["nearest_error"], 1e-30) for task in tasks) / len(tasks)
    undecided = max(task["undecided"] for task in tasks)
    to_go = f"; about {left * sum(seconds) / len(seconds):.0f} s to go" if left else ""
    gave_up = [f"{task['name']} at step {task['diverged']}" for task in tasks if task["diverged"]]
    said = f"; learning diverged ({', '.join(gave_up)}) and its best was kept: lower learning.learning_rate"
    line = f"held-out error {ratio:.2f} of nearest rounding, {undecided:.1%} undecided in {seconds[-1]:.0f} s{to_go}"
    return line + (said if gave_up else "")
