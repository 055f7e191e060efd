"""The commands that measure what formats cost, and choose among them."""

from collections.abc import Sequence
from pathlib import Path

from dmquant.errors import UsageError
from dmquant.host import processes
from dmquant.host.console import Console, quiet_libraries
from dmquant.pipelines.choice.flow import choose as choose_formats
from dmquant.pipelines.choice.flow import study_sensitivity
from dmquant.pipelines.choice.targets import Target
from dmquant.pipelines.commands.stages import explaining_a_full_disk, keep_apart
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import checked_folder
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.compare import Comparison
from dmquant.pipelines.runs.file_recipe import FileRecipe
from dmquant.pipelines.runs.runfolder import claim
from dmquant.pipelines.runs.settings import Settings


def sensitivity(settings: Settings, out: Path, overwrite: bool, formats: Sequence[str] | None, prompts: int) -> None:
    """Measure what each layer, format and range of timesteps costs, or go on from where that stopped."""
    quiet_libraries()
    console = Console()
    source = _source_of_choice(settings, out, console)
    with (
        claim(out, settings.model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        explaining_a_full_disk(out),
    ):
        study_sensitivity(settings, source, folder, console, formats, prompts)


def choose(settings: Settings, target: Target, costs: Path | None, out: Path, overwrite: bool) -> None:
    """Choose the formats of all layers for a target, and prove the choice against one format for all of equal size."""
    quiet_libraries()
    console = Console()
    source = _source_of_choice(settings, out, console)
    with (
        claim(out, settings.model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        explaining_a_full_disk(out),
    ):
        chosen = choose_formats(settings, source, target, costs, folder, console)
        Comparison(chosen.settings, source, folder, console).finish()
        chosen.tell(folder, console)


def _source_of_choice(settings: Settings, out: Path, console: Console) -> Path:
    if processes.current().count > 1:
        raise UsageError("costs are measured by one process: start it without a launcher")
    if isinstance(settings.recipe, FileRecipe):
        raise UsageError("a file that is quantized already leaves nothing to choose: give --recipe a name or YAML")
    if settings.offload:
        raise UsageError("--offload: costs are measured with all of the pipeline on the device: leave it out")
    if settings.inputs:
        raise UsageError("costs are measured on prompts alone: leave out images, and give --costs of a study without")
    source = checked_folder(settings.model, console.say)
    keep_apart(source, out)
    if len(names := settings.family.backbones_among(folders.components(source))) > 1:
        raise UsageError(f"{settings.model.name} has {len(names)} backbones, whose costs are not measured together yet")
    return source
