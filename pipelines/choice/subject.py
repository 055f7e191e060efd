"""What a study is about: a pipeline in full precision, its layers with their options, and the prompts to measure on."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.calib.choice.options import Option, options_of, plans_by_option
from dmquant.calib.choice.solving import quick
from dmquant.convert import LayerPlan, layers_in, of_backbone
from dmquant.diffusers.arguments import Calls
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.matching import Matcher, as_list
from dmquant.pipelines.choice.measuring import Bench
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


class Subject:
    """A model under a recipe, its weights those of the key `weights`; what is solved lies below `folder`.

    The pipeline is loaded when it is first asked for.
    """

    def __init__(
        self,
        settings: Settings,
        weights: str,
        folder: RunFolder,
        console: Console,
        formats: Sequence[str] | None = None,
        prompts: int = PROMPTS,
    ):
        self.settings, self.console = settings, console
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
