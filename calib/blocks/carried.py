"""What a window leaves to the next: roundings that are still soft, and what was folded for them; also on disk.

A kill between two windows costs nothing then: the next window begins with the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.blocks.codes import CodesFolder, parts_of
from dmquant.calib.blocks.state import LayerState
from dmquant.calib.layers.learner import Learner
from dmquant.formats import get_format
from dmquant.scaling import Scales

_PARTS = ("weight", "solution", "wanted")  # of a grid, float32 (rows, columns)


@dataclass
class Carried:
    """Learners by the name of their layer, and the factors folded in blocks that are not decided yet, by number."""

    codes: CodesFolder
    blocks: Sequence[str]
    """Names of all blocks."""
    states: Mapping[str, LayerState]
    learners: dict[str, Learner] = field(default_factory=dict)
    factors: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def save(self, number: int) -> None:
        """Keep on disk what goes on in the window that begins with block `number`."""
        tensors = {key: factor for factors in self.factors.values() for key, factor in factors.items()}
        facts = {}
        for name, learner in self.learners.items():
            grid, quantized, state = learner.grid, learner.quantized, self.states[name]
            kept = {part: getattr(grid, part) for part in _PARTS}
            kept |= {"scale": grid.scales.stored, "base": grid.scales.base, "input": state.input_scale}
            kept |= {f"rounding_{part}": value.detach() for part, value in learner.rounding.named_parameters()}
            for one in quantized.transforms:
                kept |= {f"{one.name}_{part}": tensor for part, tensor in quantized.parts(one).items()}
            tensors |= {f"{name}.{part}": tensor for part, tensor in kept.items() if tensor is not None}
            facts[name] = {
                "format": grid.spec.fmt.name,
                "transforms": [one.name for one in quantized.transforms],
                "inputs": state.plan.activations.fmt.name if state.plan.activations else None,
            }
        self.codes.save(*self._place(number), tensors, facts)

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` kept for the window that begins with block `number`, if it is whole and not in memory."""
        return (None if self.learners else self.codes.load(*self._place(number))) or ({}, {})

    def take_up(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], decider: Any) -> None:
        """Take up the layers of `load`, whose blocks are folded already."""
        for name, kept in facts.items():
            state, rounder = self.states[name], decider.rounder
            if kept["inputs"]:
                state.choose_input_format(get_format(kept["inputs"]))
            state.input_scale = tensors.get(f"{name}.input")
            quantized = decider.layer_to_be(name)
            quantized.transforms = tuple(one for one in quantized.transforms if one.name in kept["transforms"])
            quantized.load_parts(parts_of(tensors, name, quantized.transforms))
            spec = replace(state.plan.weights, fmt=get_format(kept["format"]))
            scales = Scales(tensors[f"{name}.scale"], tensors.get(f"{name}.base"), spec.store)
            weight, solution, wanted = (tensors.get(f"{name}.{part}") for part in _PARTS)
            grid = spec.grid_type(weight, spec, scales, tuple(state.layer.weight.shape), solution, wanted)
            rounding = rounder.method.start(grid, rounder.options)
            with torch.no_grad():
                for part, value in rounding.named_parameters():
                    value.copy_(tensors[f"{name}.rounding_{part}"])
            self.learners[name] = Learner(name, state.layer, grid, rounding, quantized, goes_on=True)

    def drop(self, number: int) -> None:
        """Forget what was kept for block `number`, which is decided."""
        self.factors.pop(number, None)
        self.codes.drop(self._place(number)[0])

    def _place(self, number: int) -> tuple[int, str]:
        """A number that no block has, nor their formats, and what stands there."""
        return len(self.blocks) + 1 + number, f"carried to {self.blocks[number]}"
