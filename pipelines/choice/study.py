"""A sensitivity study: what each layer, format and range of timesteps costs at the final latents, in a run folder.

One change at a time is measured on a few prompts. Beside it stands an estimate to second order from one pass back
(`dmquant.calib.choice.contributions`), which tells steps apart. Layers are solved in every option once; those files,
and what was measured, are kept, so that a study that was stopped goes on.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr

from dmquant.calib.choice.options import stored_bytes
from dmquant.calib.choice.solving import collecting, empty_moments, quick, solve
from dmquant.calib.layers.rounder import Rounder
from dmquant.convert import of_backbone
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.host.memory import default_budget
from dmquant.layers import QUANTIZED
from dmquant.pipelines.choice.estimates import estimates
from dmquant.pipelines.choice.measurements import measure
from dmquant.pipelines.choice.record import LayerCosts, Study
from dmquant.pipelines.choice.subject import Subject
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.runfolder import RunFolder


def make_study(subject: Subject, folder: RunFolder, console: Console) -> Study:
    """The study, from where an earlier one stopped."""
    path = folder.path / runfolder.COSTS
    if folder.finished(runfolder.COSTS, subject.key) and path.is_file():
        with contextlib.suppress(UserError):  # made again, then
            found = Study.load(path)
            console.say("costs: already there")
            return found
    began = time.perf_counter()
    bench, names = subject.bench, list(subject.plans)
    count = len(bench.clean)
    console.say(
        f"costs of {len(names)} layers in {len(subject.options)} formats, on {count} prompts of {bench.steps} calls"
    )
    _solve(subject, console)
    solved = time.perf_counter()
    found = estimates(subject, console)
    estimated = time.perf_counter()
    study = Study(
        model=subject.settings.model.name,
        recipe=subject.recipe.name,
        key=subject.key,
        base=subject.base.name,
        prompts=count,
        steps=bench.steps,
        power=bench.clean.square().mean().item(),
        layers={name: _layer(subject, name, found) for name in names},
        seconds={"solving": solved - began, "pass back": estimated - solved},
    )
    measure(subject, study, console)
    study.seconds["measuring"] = time.perf_counter() - estimated
    pairs = [(layer.estimated, layer.measured) for layer in study.layers.values()]
    if len(pairs) > 2 and all(one is not None for one, _ in pairs):
        study.correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    study.save(path)
    folder.finish(runfolder.COSTS, subject.key)
    return study


def _solve(subject: Subject, console: Console) -> None:
    """Solve the layers whose files are not there, as many at once as memory has room for moments of."""
    missing = subject.solved.missing()
    if not missing:
        return
    rounder, device = Rounder.of(quick(of_backbone(subject.recipe))), next(subject.backbone.parameters()).device
    layers = {name: subject.backbone.get_submodule(name) for name in missing}
    with console.bar("solving layers") as bar:
        done = 0
        for names in _passes(subject, missing):
            moments = {name: empty_moments(layers[name], subject.plans[name], device) for name in names}
            with collecting(layers, {name: one for name, one in moments.items() if one}):
                subject.behind.run()
            for name in names:
                bar(done, len(missing), name)
                collected = moments.pop(name)
                if collected is not None and not collected.tokens:
                    collected = None  # a layer that these calls do not reach
                subject.solved.keep(name, solve(layers[name], subject.plans[name], rounder, collected))
                done += 1


def _passes(subject: Subject, names: Sequence[str]) -> Iterator[list[str]]:
    budget = subject.settings.memory_budget or default_budget(next(subject.backbone.parameters()).device)
    group, held = [], 0
    for name in names:
        empty = empty_moments(subject.backbone.get_submodule(name), subject.plans[name], torch.device("meta"))
        needed = 3 * (empty.sums.nbytes if empty else 0)  # their factors, too
        if group and held + needed > budget:
            yield group
            group, held = [], 0
        group, held = [*group, name], held + needed
    yield group


def _layer(subject: Subject, name: str, estimates: Mapping[str, dict[str, Any]]) -> LayerCosts:
    layer, errors = subject.backbone.get_submodule(name), subject.solved.errors(name)
    shape = tuple(layer.weight.shape)
    return LayerCosts(
        kind=next(kind.__name__ for kind in QUANTIZED if isinstance(layer, kind)),
        weights=layer.weight.numel(),
        kept=subject.kept.get(name),
        bytes={option: stored_bytes(step, shape) for option, step in subject.plans[name].items()},
        errors=errors,
        **estimates.get(name, {}),
    )
