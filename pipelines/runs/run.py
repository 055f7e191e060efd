"""A run: a model and one recipe, from full precision to a report."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from dmquant.errors import UserError
from dmquant.evaluation.report.image_grid import draw_grid
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.files import write_text
from dmquant.host.text import yaml_text
from dmquant.host.yaml_loading import load_yaml
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.closing_tables import closing_table
from dmquant.pipelines.runs.file_recipe import FileRecipe
from dmquant.pipelines.runs.file_side import side_of
from dmquant.pipelines.runs.image_stage import FP, QUANTIZED, save_inputs
from dmquant.pipelines.runs.run_report import build_report, write_all_reports
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.sides import FullPrecision, fingerprints_of
from dmquant.pipelines.runs.source import resumed_source


class Run:
    """A model and one recipe: both sides, a grid and a report in one folder."""

    def __init__(self, settings: Settings, source: Path, folder: RunFolder, console: Console):
        self.settings, self.folder, self.console = settings, folder, console
        self.reference = FullPrecision(settings, resumed_source(settings, source, folder, console), folder, console)
        self.quantized = side_of(settings, self.reference, folder, folder.path / runfolder.CALIBRATION)

    def finish(self) -> None:
        """Every stage in order, from where an earlier run stopped."""
        self.console.say(f"{quantization_line(self.settings)}; {images_line(self.settings)}")
        if self.settings.inputs:
            self.settings.inputs.say(self.console)
        recipe = {"recipe": self.settings.recipe.to_dict()}
        fingerprints = {"fingerprints": self.reference.fingerprints | fingerprints_of(self.settings, self.reference)}
        record = self.settings.to_dict(self.reference.source.sha256, recipe) | fingerprints
        save_settings(self.folder, record)
        self.reference.images()
        self.quantized.make()
        self.quantized.score()
        processes.current().on_main(lambda: self._report(record))

    def _report(self, record: dict[str, Any]) -> None:
        path = self.folder.path
        heading = "W {} A {}".format(*(name.partition("_")[0] for name in self.settings.formats))
        inputs = save_inputs(self.settings, self.folder)
        draw_grid(
            {"full precision": self.folder.images(FP), heading: self.folder.images(QUANTIZED)},
            self.settings.prompts,
            path / runfolder.GRID,
            inputs=inputs,
        )
        result = build_report(self.folder, record)
        write_all_reports(self.folder, record, result, self.console)
        self.console.show(closing_table(result))
        recipe = self.settings.recipe
        model = recipe.foreign.found.path if isinstance(recipe, FileRecipe) else path / runfolder.MODEL
        self.console.say(f"report: {path / 'report.html'}   grid: {path / runfolder.GRID}   model: {model}")


def quantization_line(settings: Settings) -> str:
    """A line on the model and its quantization."""
    weights, activations = settings.formats
    return f"{settings.model.name}: weights {weights}, activations {activations}, recipe {settings.recipe.name}"


def images_line(settings: Settings) -> str:
    """A line on the images to make, and their folder."""
    return (
        f"{len(settings.prompts)} prompts, {settings.steps} steps, guidance {settings.guidance:g}, "
        f"{settings.width}x{settings.height}, seed {settings.seed}; {settings.device}, {settings.dtype_name}"
        + (f"; {settings.inputs.line()}" if settings.inputs else "")
    )


def save_settings(folder: RunFolder, record: dict[str, Any]) -> None:
    """Write run.yaml."""
    text = yaml_text(record, width=120)
    folder.note(runfolder.SETTINGS, {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    processes.current().on_main(lambda: write_text(folder.path / runfolder.SETTINGS, text))


def saved_settings(folder: RunFolder) -> dict[str, Any]:
    """What run.yaml holds; UserError where it is not there as it was written."""
    path, noted = folder.path / runfolder.SETTINGS, folder.notes(runfolder.SETTINGS)
    try:
        text = path.read_text(encoding="utf-8")
        settings = load_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path} ({' '.join(str(error).split())}): give the run's command again") from error
    if not isinstance(settings, dict) or (noted and noted["sha256"] != hashlib.sha256(text.encode()).hexdigest()):
        raise UserError(f"{path} was changed since the run wrote it: give the run's command again")
    return settings
