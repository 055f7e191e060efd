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
    FROM_DISK where its codes were on disk.
    """
    began, streams, number = time.perf_counter(), decider.streams, inputs.number
    block = streams.blocks[number]
    tensors, facts = codes.load(number, block.name) or ({}, None)
    tensors = {key: tensor.to(streams.device) for key, tensor in tensors.items()}
    factors = _fold_(decider, block, tensors, inputs)
    streams.carry(streams.full, number, inputs.title, inputs.bar)
    if facts:
        weights = _read_back(decider, block, tensors, facts)
        facts[FROM_DISK] = True
    else:
        weights, tasks = _decided(decider, block, inputs)
        states = {name: decider.states[name] for name in block.layers}
        facts = {
            "name": block.name,
            "formats": {name: weights[name].spec.fmt.name for name in block.layers},
            "transforms": {name: [one.name for one in state.plan.transforms] for name, state in states.items()},
            "tasks": tasks,
            "seconds": time.perf_counter() - began,
        }
        parts = {name: state.parts for name, state in states.items()}
        codes.save(number, block.name, tensors_of(weights, parts) | factors, facts)
    for name, weight in weights.items():
        decider.states[name].put_in_place_(weight)
    with sharing_inputs([decider.states[name].layer for name in weights]):
        streams.carry(streams.quantized, number, inputs.title, inputs.bar)
    streams.drop(number)
    return facts


def _fold_(decider: Decider, block: Block, tensors: Mapping[str, Tensor], inputs: BlockInputs) -> dict[str, Tensor]:
    """Fold transforms of a block's layers by the factors among its `tensors` on disk, or else by its inputs.

    Returns the factors by their keys.
    """
    states, factors, changed = decider.states, {}, {}
    for method in folded_methods(plans_of(states)):
        folds = folds_of(decider.backbone, block.name, plans_of(states), method)
        if tensors:
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
    fit_again_(states, changed, inputs)
    return factors


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
    decider: Decider, block: Block, inputs: BlockInputs
) -> tuple[dict[str, QuantizedTensor], list[dict[str, Any]]]:
    """The weights of a block, decided task by task, and how the learning of each task ended."""
    weights, tasks = {}, []
    for task in tasks_of(decider.streams.blocks, inputs.number, decider.options):
        learned, codes = decider.decide(task, weights, inputs)
        weights |= {name: codes[name] for name in task.layers if name in block.layers}
        tasks.append({"name": task.output, **asdict(learned)})
    return {name: weights[name] for name in block.layers}, tasks
