"""The stages of a study and of a choice in a run folder, from where they stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmquant.evaluation.networks import Networks
from dmquant.evaluation.result import RecipeResult
from dmquant.host.console import Console
from dmquant.host.files import write_text
from dmquant.host.text import yaml_text
from dmquant.pipelines.choice.choosing import Chooser, Chosen, other_bytes
from dmquant.pipelines.choice.pages import write_pages
from dmquant.pipelines.choice.quality import Quality
from dmquant.pipelines.choice.record import Study
from dmquant.pipelines.choice.study import make_study
from dmquant.pipelines.choice.subject import PROMPTS, Subject
from dmquant.pipelines.choice.targets import Target
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.run import saved_settings
from dmquant.pipelines.runs.run_report import build_report
from dmquant.pipelines.runs.runfolder import RunFolder, claim
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.source import source_of

FAR = 0.1  # LPIPS from which on pairs count as different (../docs/sensitivity.md)


def study_sensitivity(
    settings: Settings,
    source: Path,
    folder: RunFolder,
    console: Console,
    formats: Sequence[str] | None,
    prompts: int = PROMPTS,
) -> Study:
    """A study in its folder, with its pages."""
    key = source_of(settings, source, console).key
    study = make_study(Subject(settings, key, folder, console, formats, prompts), folder, console)
    write_pages(study, settings.family, folder.path, console)
    return study


@dataclass(frozen=True)
class Choices:
    """The settings of the chosen recipe, and of the uniform one where there is one, by name."""

    chosen: Chosen
    settings: Mapping[str, Settings]

    def tell(self, folder: RunFolder, console: Console) -> None:
        """Say what the comparison found, and where the recipe lies."""
        recipes = build_report(folder, saved_settings(folder)).recipes
        of_chosen = recipes[self.chosen.recipe.name]
        if self.chosen.uniform is not None:
            names = self.chosen.recipe.name, self.chosen.uniform.name
            made = [RunFolder(folder.recipe(name)).record("model") for name in names]
            counts = tuple(one["bits_per_quantized_weight"] for one in made)
            console.say(gain_line(of_chosen, recipes[names[1]], counts))
        console.say(f"recipe: {folder.path / runfolder.CHOSEN}")


def choose(
    settings: Settings, source: Path, target: Target, costs: Path | None, folder: RunFolder, console: Console
) -> Choices:
    """Choose by costs: those of a study in the folder `costs`, or one made below `folder`."""
    key = source_of(settings, source, console).key
    place = costs or folder.path / runfolder.SENSITIVITY
    with claim(place, settings.model.name) as of_study:
        subject = Subject(settings, key, of_study, console)
        study = make_study(subject, of_study, console)
        write_pages(study, settings.family, of_study.path, console)
        quality = None
        if target.psnr is not None or target.lpips is not None:
            networks = Networks(settings.device, settings.clip, of_study.path / runfolder.FEATURES, console.say)
            quality = Quality(subject, networks)
        backbone = skeleton(source / settings.family.component)
        chosen = Chooser(settings.recipe, study, console, other_bytes(backbone, study), quality).choose(target)
    for line in chosen.lines:
        console.say(line)
    write_text(folder.path / runfolder.CHOSEN, yaml_text(chosen.recipe.to_dict(), width=120))
    recipes = [chosen.recipe, *([chosen.uniform] if chosen.uniform else [])]
    return Choices(chosen, {recipe.name: replace(settings, recipe=recipe) for recipe in recipes})


def gain_line(chosen: RecipeResult, uniform: RecipeResult, bits: tuple[float, ...]) -> str:
    """A line that sets the two beside each other; `bits` a quantized weight of both."""
    parts = ["{:.3f} bits a weight against {:.3f}".format(*bits)]
    for name, unit in (("psnr", " dB"), ("lpips", "")):
        one, other = chosen.metrics.get(name), uniform.metrics.get(name)
        if one is not None and other is not None and None not in (one.value, other.value):
            parts.append(f"{name} {one.value:.4g}{unit} against {other.value:.4g}{unit}")
            if name == "lpips" and one.values and other.values:
                far = [sum(value > FAR for value in each.values) / len(each.values) for each in (one, other)]
                parts.append(f"{far[0]:.0%} of the pairs above {FAR} against {far[1]:.0%}")
    return f"chosen against one format for all: {', '.join(parts)}"
