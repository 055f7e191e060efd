"""A sensitivity study: what each layer, format and range of timesteps costs at the final latents, in a run folder.

One change at a time is measured on a few prompts. Beside it stands an estimate to second order from one pass back
(`dmquant.calib.choice.contributions`), which tells steps apart. Layers are solved in every option once; those files,
and what was measured, are kept, so that a study that was stopped goes on.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.calib.choice.contributions import Change
from dmquant.calib.choice.options import Option, options_of, plans_by_option, stored_bytes
from dmquant.calib.choice.solving import collecting, empty_moments, quick, solve
from dmquant.calib.layers.rounder import Rounder
from dmquant.convert import LayerPlan, layers_in, of_backbone
from dmquant.diffusers.arguments import Calls
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.host.files import fingerprint, sealed_json, take_seal, write_text
from dmquant.host.memory import default_budget
from dmquant.layers import QUANTIZED
from dmquant.matching import Matcher, as_list
from dmquant.pipelines.choice.measuring import Bench, quantizer
from dmquant.pipelines.choice.record import LayerCosts, RangeCosts, Study
from dmquant.pipelines.choice.solved import SolvedLayers
from dmquant.pipelines.models.attention import check_attention
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.calibration import FIRST_SEED
from dmquant.pipelines.runs.model_stage import load_source
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings
from dmquant.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPTS = 5
"""Prompts that costs are measured on; as many more, behind them in the list, are what layers are solved on."""
RANGES = 5
INPUTS = ("fp4", "fp6", "fp8", "int8")
WEIGHTS, OF_INPUTS = "weights", "inputs"


class Sensitivity:
    """A study of a model under a recipe in a run folder; `pipeline` loads full precision when it is needed."""

    def __init__(
        self,
        settings: Settings,
        weights: str,
        folder: RunFolder,
        console: Console,
        formats: Sequence[str] | None,
        prompts: int = PROMPTS,
    ):
        self.settings, self.folder, self.console = settings, folder, console
        self.recipe: Recipe = settings.recipe
        self.options = options_of(of_backbone(self.recipe), formats)
        listed = settings.calibration_prompts
        if len(listed) < 2:
            raise UserError("costs take two prompts at least: one to solve layers on, and one to measure them on")
        self.measured_on = min(prompts, len(listed) // 2)
        self.prompts = listed[: 2 * self.measured_on]
        self.key = fingerprint(
            source=weights,
            recipe=self.recipe.to_dict(),
            options={option.name: dict(option.settings) for option in self.options},
            prompts=list(self.prompts),
            call=settings.call,
            dtype=settings.dtype_name,
            device=settings.device.partition(":")[0],
        )
        self.room = folder.path / runfolder.OPTIONS / self.key[:8]

    @property
    def base(self) -> Option:
        """The recipe's own weights, in which layers are measured."""
        return self.options[0]

    def finish(self) -> Study:
        """The study, from where an earlier one stopped."""
        path = self.folder.path / runfolder.COSTS
        if self.folder.finished(runfolder.COSTS, self.key) and path.is_file():
            self.console.say("costs: already there")
            return Study.load(path)
        began = time.perf_counter()
        bench, names = self.bench, list(self.plans)
        count = len(bench.clean)
        self.console.say(
            f"costs of {len(names)} layers in {len(self.options)} formats, on {count} prompts of {bench.steps} calls"
        )
        self._solve()
        solved = time.perf_counter()
        estimates = self._estimates()
        estimated = time.perf_counter()
        study = Study(
            model=self.settings.model.name,
            recipe=self.recipe.name,
            key=self.key,
            base=self.base.name,
            prompts=count,
            steps=bench.steps,
            power=bench.clean.square().mean().item(),
            layers={name: self._layer(name, estimates) for name in names},
            seconds={"solving": solved - began, "pass back": estimated - solved},
        )
        self._measure(study)
        study.seconds["measuring"] = time.perf_counter() - estimated
        pairs = [(layer.estimated, layer.measured) for layer in study.layers.values()]
        if len(pairs) > 2 and all(one is not None for one, _ in pairs):
            study.correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        study.save(path)
        self.folder.finish(runfolder.COSTS, self.key)
        return study

    @cached_property
    def pipeline(self) -> "DiffusionPipeline":
        pipeline = load_source(self.settings, self.console)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        check_attention(getattr(pipeline, self.settings.family.component))
        return pipeline

    @cached_property
    def bench(self) -> Bench:
        """The pipeline on the prompts that costs are measured on."""
        return self._bench(self.prompts[: self.measured_on])

    @cached_property
    def behind(self) -> Bench:
        """The pipeline on the prompts that layers are solved on."""
        return self._bench(self.prompts[self.measured_on :])

    def _bench(self, prompts: Sequence[str]) -> Bench:
        family = self.settings.family
        calls = Calls(prompts, FIRST_SEED, self.settings.call)
        return Bench(family.prompted(self.pipeline), family.component, calls, self.settings.batch_size)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self.pipeline, self.settings.family.component)

    @cached_property
    def plans(self) -> dict[str, dict[str, LayerPlan]]:
        """Plans by layer and option; of all layers, also of those that the recipe keeps."""
        known = self.settings.family.known(self.backbone)
        everything = quick(of_backbone(self.recipe)).with_settings(keep="none", rules=[]).splitting(known.splits)
        found = {
            name: of_layer
            for name, of_layer in plans_by_option(self.backbone, everything, self.options).items()
            if self.base.name in of_layer
        }
        base = self.base.name  # layers that stay in high precision are measured, and there is nothing to choose
        return {name: {base: of_layer[base]} if name in self.kept else of_layer for name, of_layer in found.items()}

    @cached_property
    def kept(self) -> dict[str, str]:
        """Why the recipe leaves layers in high precision, by name."""
        recipe = of_backbone(self.settings.recipe_for(self.backbone))
        reasons = dict(self.settings.family.keep)
        settings = recipe.settings_by_layer(layers_in(self.backbone))
        matcher = Matcher([[pattern] for pattern in reasons])
        ours = [rule for rule in recipe.rules if rule.keep]
        of_rules = Matcher([rule.match for rule in ours])

        def why(name: str) -> str:
            found = [list(reasons.values())[place] for place in matcher.matching(name)]
            found += [
                ours[place].reason or f"rule {', '.join(as_list(ours[place].match))}"
                for place in of_rules.matching(name)
            ]
            return found[0] if found else "the recipe"

        return {name: why(name) for name, of_layer in settings.items() if of_layer is None}

    @cached_property
    def solved(self) -> SolvedLayers:
        return SolvedLayers(self.room, self.backbone, self.plans)

    @cached_property
    def quantized(self) -> list[str]:
        """The layers that the recipe quantizes."""
        return [name for name in self.plans if name not in self.kept]

    @cached_property
    def inputs(self) -> dict[str, ActivationSpec]:
        """How the recipe quantizes the inputs of its layers, by name; without those that it leaves alone."""
        steps = {name: self.plans[name][self.base.name] for name in self.quantized}
        return {name: step.activations for name, step in steps.items() if step.activations is not None}

    def _solve(self) -> None:
        """Solve the layers whose files are not there, as many at once as memory has room for moments of."""
        missing = self.solved.missing()
        if not missing:
            return
        rounder, device = Rounder.of(quick(of_backbone(self.recipe))), next(self.backbone.parameters()).device
        layers = {name: self.backbone.get_submodule(name) for name in missing}
        with self.console.bar("solving layers") as bar:
            done = 0
            for names in self._passes(missing):
                moments = {name: empty_moments(layers[name], self.plans[name], device) for name in names}
                with collecting(layers, {name: one for name, one in moments.items() if one}):
                    self.behind.run()
                for name in names:
                    bar(done, len(missing), name)
                    collected = moments.pop(name)
                    if collected is not None and not collected.tokens:
                        collected = None  # a layer that these calls do not reach
                    self.solved.keep(name, solve(layers[name], self.plans[name], rounder, collected))
                    done += 1

    def _passes(self, names: Sequence[str]) -> Iterator[list[str]]:
        budget = self.settings.memory_budget or default_budget(next(self.backbone.parameters()).device)
        group, held = [], 0
        for name in names:
            empty = empty_moments(self.backbone.get_submodule(name), self.plans[name], torch.device("meta"))
            needed = 3 * (empty.sums.nbytes if empty else 0)  # their factors, too
            if group and held + needed > budget:
                yield group
                group, held = [], 0
            group, held = [*group, name], held + needed
        yield group

    def _layer(self, name: str, estimates: Mapping[str, dict[str, Any]]) -> LayerCosts:
        layer, errors = self.backbone.get_submodule(name), self.solved.errors(name)
        shape = tuple(layer.weight.shape)
        return LayerCosts(
            kind=next(kind.__name__ for kind in QUANTIZED if isinstance(layer, kind)),
            weights=layer.weight.numel(),
            kept=self.kept.get(name),
            bytes={option: stored_bytes(step, shape) for option, step in self.plans[name].items()},
            errors=errors,
            **estimates.get(name, {}),
        )

    def _estimates(self) -> dict[str, dict[str, Any]]:
        """Of each layer the second-order estimates; none where the pipeline has no derivative."""
        changes = {name: self._changes(name) for name in self.plans}
        try:
            with self.console.bar("one pass back") as bar:
                bar(0, 1)
                found = [one for bench in (self.bench, self.behind) for one in bench.contributions(changes)]
        except (RuntimeError, NotImplementedError, UserError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = " ".join(str(error).split())[:160]
            self.console.say(f"note: no estimates to second order: the pipeline has no pass back ({said})")
            return {}
        finally:
            self.solved.forget()
        elements = self.bench.clean[0].numel()
        estimates = {}
        for name in self.plans:

            def mean(kind: str, name: str = name) -> float:
                return torch.cat([one.total(name, kind) for one in found]).mean().item() / elements

            steps = torch.cat([one.by_step(name, WEIGHTS) for one in found], 1).mean(1) / elements
            of_inputs = {"inputs": mean(OF_INPUTS)} if OF_INPUTS in changes[name] else {}
            estimates[name] = {"estimated": mean(WEIGHTS), "by_step": steps.tolist(), **of_inputs}
        return estimates

    def _changes(self, name: str) -> dict[str, Change]:
        layer, step = self.backbone.get_submodule(name), self.plans[name][self.base.name]

        def product(x: Tensor, weight: Tensor) -> Tensor:
            if isinstance(layer, nn.Linear):
                return nn.functional.linear(x, weight.to(x.dtype))
            return layer._conv_forward(x, weight.to(x.dtype), None)

        def of_weight(x: Tensor) -> Tensor:
            return product(x, self.solved.change(name, self.base.name))

        changes = {WEIGHTS: of_weight}
        if step.activations is not None:
            quantize = quantizer(layer, step.activations)
            changes[OF_INPUTS] = lambda x: product(quantize(x) - x, layer.weight.detach())
        return changes

    def _measure(self, study: Study) -> None:
        """Measure one change after another; what an earlier study measured is kept."""
        bench, plans = self.bench, self.plans
        quantized, own = self.quantized, self.inputs
        known, path = self._known(), self.room / "measured.json"
        inputs = {
            fmt: {name: ActivationSpec.parse(fmt, _granularity(plans[name][self.base.name])) for name in quantized}
            for fmt in INPUTS
        }
        spans = [
            (first, last)
            for part in range(RANGES)
            if (first := part * bench.steps // RANGES) < (last := (part + 1) * bench.steps // RANGES)
        ]
        tasks: dict[str, Any] = {}
        for name in plans:
            tasks[f"layer {name}"] = lambda name=name: bench.weights(self.solved.weights([name], self.base.name))
        for option in self.options:
            if all(option.name in plans[name] for name in quantized):
                tasks[f"format {option.name}"] = lambda option=option: bench.weights(
                    self.solved.weights(quantized, option.name)
                )
        for fmt, specs in inputs.items():
            tasks[f"inputs {fmt}"] = lambda specs=specs: bench.inputs(specs)
        for first, last in spans:

            def inside(call: int, first: int = first, last: int = last) -> bool:
                return first <= call < last

            tasks[f"weights {first}-{last}"] = lambda inside=inside: bench.weights(
                self.solved.weights(quantized, self.base.name), inside
            )
            if own:
                tasks[f"inputs {first}-{last}"] = lambda inside=inside: bench.inputs(own, inside)
        with self.console.bar("measuring") as bar:
            for done, (what, change) in enumerate(tasks.items()):
                if what in known:
                    continue
                bar(done, len(tasks), what)
                with change():
                    known[what] = bench.cost()
                write_text(path, json.dumps(sealed_json({"costs": known})) + "\n")
            bar(len(tasks), len(tasks))
        for name, layer in study.layers.items():
            layer.measured = known[f"layer {name}"]
        study.formats = {one.name: known[f"format {one.name}"] for one in self.options if f"format {one.name}" in known}
        study.inputs = {fmt: known[f"inputs {fmt}"] for fmt in INPUTS}
        study.ranges = [
            RangeCosts(
                first=first,
                last=last - 1,
                weights=known[f"weights {first}-{last}"],
                inputs=known.get(f"inputs {first}-{last}"),
            )
            for first, last in spans
        ]

    def _known(self) -> dict[str, float]:
        try:
            content = json.loads((self.room / "measured.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return dict(content["costs"]) if isinstance(content, dict) and take_seal(content) else {}


def _granularity(step: LayerPlan) -> str:
    """The granularity of inputs that other formats are tried in: the recipe's own, or of tokens."""
    own = step.activations
    return str(own.granularity) if own is not None and own.ranges is None and own.engine is None else "token"
