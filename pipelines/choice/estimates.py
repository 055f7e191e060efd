"""Second-order estimates of what layers cost, from one pass back through the sampler."""

from typing import Any

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.calib.choice.contributions import Change
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.pipelines.choice.measuring import quantizer
from dmquant.pipelines.choice.subject import Subject

WEIGHTS = "weights"  # a kind of change, beside inputs in some spec


def estimates(subject: Subject, console: Console) -> dict[str, dict[str, Any]]:
    """Of each layer the second-order estimates; none where the pipeline has no derivative."""
    changes = {name: _changes(subject, name) for name in subject.plans}
    try:
        with console.bar("one pass back") as bar:
            bar(0, 1)
            found = [one for bench in (subject.bench, subject.behind) for one in bench.contributions(changes)]
    except (RuntimeError, NotImplementedError, UserError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = " ".join(str(error).split())[:160]
        console.say(f"note: no estimates to second order: the pipeline has no pass back ({said})")
        return {}
    finally:
        subject.solved.forget()
    elements = subject.bench.clean[0].numel()
    by_layer = {}
    for name, of_layer in changes.items():
        total = {
            kind: torch.cat([one.total(name, kind) for one in found]).mean().item() / elements for kind in of_layer
        }
        steps = torch.cat([one.by_step(name, WEIGHTS) for one in found], 1).mean(1) / elements
        specs = {option: str(step.activations) for option, step in subject.plans[name].items() if step.activations}
        by_layer[name] = {
            "estimated": total[WEIGHTS],
            "by_step": steps.tolist(),
            "inputs": {option: total[spec] for option, spec in specs.items()},
        }
    return by_layer


def _changes(subject: Subject, name: str) -> dict[str, Change]:
    """What a layer's output changes by: of the weight in the base option, and of the input in each spec."""
    layer = subject.backbone.get_submodule(name)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(x, weight.to(x.dtype))
        return layer._conv_forward(x, weight.to(x.dtype), None)

    def of_weight(x: Tensor) -> Tensor:
        return product(x, subject.solved.change(name, subject.base.name))

    def of_input(spec: ActivationSpec) -> Change:
        quantize = quantizer(layer, spec)
        return lambda x: product(quantize(x) - x, layer.weight.detach())

    changes = {WEIGHTS: of_weight}
    for each in subject.plans[name].values():
        if each.activations is not None and str(each.activations) not in changes:
            changes[str(each.activations)] = of_input(each.activations)
    return changes
