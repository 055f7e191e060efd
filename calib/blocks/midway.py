"""The state of a loop that learns, kept in a folder every so many steps, so that a killed one goes on where it was."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmquant.calib.blocks.codes import CodesFolder
from dmquant.calib.layers.learner import Learner
from dmquant.rounding import Rounded


class Reached(NamedTuple):
    """How far a loop is: the steps done, and the best of the roundings tried, by layer."""

    step: int
    kept: dict[str, Rounded]
    error: float
    best_step: int
    solved: bool


@dataclass(frozen=True)
class Midway:
    """Where the state of one loop is kept: as the file of this number and name among the codes."""

    folder: CodesFolder
    number: int
    name: str
    every: int
    """Steps from one state kept to the next."""
    on_save: Callable[[int], None] = lambda step: None
    """Told the step of every state that was kept."""

    def save(
        self,
        reached: Reached,
        learners: Sequence[Learner],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        """Keep the state of a loop."""
        tensors = {"generator": generator.get_state()} | _of_optimizer(optimizer)
        for learner in learners:
            learnt = learner.rounding.named_parameters()  # its buffers are what it began with
            tensors |= {f"{learner.name}/own/{part}": parameter for part, parameter in learnt}
            values, grid = reached.kept[learner.name]
            tensors |= {f"{learner.name}/kept/values": values, f"{learner.name}/kept/scale": grid.scales.stored}
            if grid.scales.base is not None:
                tensors[f"{learner.name}/kept/base"] = grid.scales.base
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}  # none shares memory with another
        facts = reached._replace(kept=None)._asdict()
        self.folder.save(self.number, self.name, tensors, facts)
        self.on_save(reached.step)

    def load_(
        self, learners: Sequence[Learner], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> Reached | None:
        """Put the state that was kept last into a loop that has just begun; None where there is none."""
        found = self.folder.load(self.number, self.name)
        if found is None:
            return None
        tensors, facts = found
        generator.set_state(tensors["generator"])
        _into_optimizer_(optimizer, tensors)
        kept = {}
        for learner in learners:
            device = learner.grid.weight.device
            own, best = (_below(f"{learner.name}/{part}/", tensors, device) for part in ("own", "kept"))
            for part, parameter in learner.rounding.named_parameters():
                parameter.data.copy_(own[part])
            scales = replace(learner.grid.scales, stored=best["scale"], base=best.get("base"))
            kept[learner.name] = Rounded(best["values"], replace(learner.grid, scales=scales))
        return Reached(**facts | {"kept": kept})


def _below(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): each.to(device) for key, each in tensors.items() if key.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer/{index}/{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state[parameter].items()
    }


def _into_optimizer_(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    for index, parameter in enumerate(_parameters(optimizer)):
        optimizer.state[parameter].update(_below(f"optimizer/{index}/", tensors, parameter.device))
