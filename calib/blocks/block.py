"""Quantize one block of a backbone in place, by codes on disk or else by deciding them."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from dmquant.calib.blocks.codes import CodesFolder, parts_of, tensors_of, weight_of
from dmquant.calib.blocks.decide import Decider
from dmquant.calib.blocks.input_specs import fit_again_
from dmquant.calib.blocks.inputs import BlockInputs
from dmquant.calib.blocks.once import sharing_inputs
from dmquant.calib.blocks.state import plans_of
from dmquant.calib.blocks.units import Block, Task, tasks_of
from dmquant.calib.layers.folding import folded_methods, folds_of, shared_factor
from dmquant.formats import get_format
from dmquant.qtensor import QuantizedTensor

FROM_DISK = "from_disk"


def calibrate_block_(decider: Decider, codes: CodesFolder, inputs: BlockInputs) -> dict[str, Any]:
    """Quantize the block of `inputs` in place, keep its codes, and carry both streams past it.

    Returns the block's name, seconds, formats and transforms by layer, and how the learning of each task ended; with
    FROM_DISK, which says why, where its codes were on disk.
    """
    streams, number = decider.streams, inputs.number
    block = streams.blocks[number]
    tensors, facts = codes.load(number, block.name) or ({}, None)
    tensors = {key: tensor.to(streams.device) for key, tensor in tensors.items()}
    if facts:
        why = "already there" if number not in decider.carried.factors else "decided with the blocks before it"
        _fold_(decider, number, tensors, inputs)
        streams.carry(streams.full, number, inputs.title, inputs.bar)
        weights = _read_back(decider, block, tensors, facts)
        facts[FROM_DISK] = why
    else:
        weights, facts = _decided(decider, codes, inputs)
    decider.carried.drop(number)
    for name, weight in weights.items():
        decider.states[name].put_in_place_(weight)
    with sharing_inputs([decider.states[name].layer for name in weights]):
        streams.carry(streams.quantized, number, inputs.title, inputs.bar)
    streams.drop(number)
    return facts


def _fold_(decider: Decider, number: int, tensors: Mapping[str, Tensor], inputs: BlockInputs) -> None:
    """Fold transforms of the layers of block `number` by the factors among these `tensors`, or else by its inputs.

    Nothing is done where a window has done it already. The factors stay with what is carried on.
    """
    if number in decider.carried.factors:
        return
    states, factors, changed, block = decider.states, {}, {}, decider.streams.blocks[number]
    for method in folded_methods(plans_of(states)):
        folds = folds_of(decider.backbone, block.name, plans_of(states), method)
        if all(fold.key in tensors for fold in folds):
            factors |= {fold.key: tensors[fold.key] for fold in folds}
        else:
            readers = tuple(name for fold in folds for name in fold.readers)
            layers = {name: decider.layer_to_be(name) for name in readers}
            statistics = inputs.statistics(Task(block.name, readers, (block.name,)), layers)
            factors |= {fold.key: shared_factor(fold, plans_of(states), layers, statistics) for fold in folds}
        for fold in folds:
            fold.pair.scale_(factors[fold.key])
            for name in fold.readers:
                states[name].drop_transform(method)
            if (factors[fold.key] != 1).any():
                changed |= dict.fromkeys(fold.readers)
    fit_again_(states, changed, inputs, block.name)
    decider.carried.factors[number] = factors


def _read_back(
    decider: Decider, block: Block, tensors: Mapping[str, Tensor], facts: dict[str, Any]
) -> dict[str, QuantizedTensor]:
    """The weights of a finished block; its layers' parts and transforms go to their states."""
    weights = {}
    for name in block.layers:
        state = decider.states[name]
        state.keep_transforms(facts["transforms"][name])
        state.parts = parts_of(tensors, name, state.plan.transforms)
        spec = replace(state.plan.weights, fmt=get_format(facts["formats"][name]))
        weights[name] = weight_of(tensors, name, spec, tuple(state.layer.weight.shape))
    return weights


def _decided(
    decider: Decider, codes: CodesFolder, inputs: BlockInputs
) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
    """The weights of a block, decided task by task, and what is told of them.

    They are kept on disk, and so is what its window leaves to the next one, and the codes of other blocks that the
    window decides. The block's own come last: until they are there, all of it is done again.
    """
    began, streams, number, states = time.perf_counter(), decider.streams, inputs.number, decider.states
    carried, blocks = decider.carried, decider.streams.blocks
    tasks, weights, ended = tasks_of(blocks, number, decider.options), {}, []
    members = [index for index, block in enumerate(blocks) if {*block.layers} & {*tasks[0].layers}]
    kept, layers = carried.load(number)
    kept = {key: tensor.to(streams.device) for key, tensor in kept.items()}
    for member in members:
        _fold_(decider, member, kept, inputs)
    carried.take_up(kept, layers, decider)
    streams.carry(streams.full, number, inputs.title, inputs.bar)
    for task in tasks:
        learned, decided = decider.decide(task, weights, inputs)
        weights |= decided
        ended.append({"name": task.output, **asdict(learned)})
    decided = [member for member in members if weights.keys() >= {*blocks[member].layers}]
    if len(decided) < len(members):
        carried.save(decided[-1] + 1)
    seconds = (time.perf_counter() - began) / len(decided)
    for member in reversed(decided):
        layers = blocks[member].layers
        facts = {
            "name": blocks[member].name,
            "formats": {name: weights[name].spec.fmt.name for name in layers},
            "transforms": {name: [one.name for one in states[name].plan.transforms] for name in layers},
            "tasks": ended,
            "seconds": seconds,
        }
        parts = {name: states[name].parts for name in layers}
        tensors = tensors_of({name: weights[name] for name in layers}, parts) | carried.factors[member]
        codes.save(member, blocks[member].name, tensors, facts)
    return {name: weights[name] for name in blocks[number].layers}, facts
