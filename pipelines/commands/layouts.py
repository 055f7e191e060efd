"""Model folders in the layout of another loader, written by the commands that make the model."""

from pathlib import Path

from dmquant.convert import component_names
from dmquant.errors import UsageError, UserError
from dmquant.host import owned
from dmquant.pipelines.commands import exporting, stages
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.defaults import LAYOUTS
from dmquant.pipelines.runs.settings import Settings


def check(layout: str, settings: Settings) -> None:
    """UsageError for a recipe whose model the loader of a layout cannot, or may not be able to, hold."""
    if layout != LAYOUTS[0] and getattr(settings.recipe, "engine", None) != layout:
        raise UsageError(
            f"--layout {layout} takes a recipe that is made for it: leave out --recipe {settings.recipe.name}, or give "
            f"it engine: {layout}; `dmquant export` tries any model"
        )
    if layout != LAYOUTS[0] and (names := component_names(settings.recipe)):
        raise UsageError(f"--layout {layout} holds the backbone alone: leave out --component {names[0]}")


def add_to_run(layout: str, folder: Path) -> None:
    """Beside the model of a finished run, the same in another layout, with the run's scores in its card."""
    if layout != LAYOUTS[0]:
        exporting.export(folder, layout, folder / f"{runfolder.MODEL}-{layout}", overwrite=True)


def quantize(layout: str, settings: Settings, out: Path, overwrite: bool) -> None:
    """`stages.quantize` to a folder in a layout. dmquant's own stays beside it if that fails."""
    if layout == LAYOUTS[0]:
        stages.quantize(settings, out, overwrite)
        return
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already: choose another place with --out, or replace it with --overwrite")
    with owned.workspace(out) as room:
        own = room / runfolder.MODEL
        stages.quantize(settings, own, overwrite=True)
        exporting.export(own, layout, out, overwrite)
