"""A comparison: several recipes against one set of full-precision images, in one folder."""

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmquant.errors import UserError
from dmquant.evaluation.report.comparison_plot import draw_comparison
from dmquant.evaluation.report.image_grid import draw_grid
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.closing_tables import comparison_tables
from dmquant.pipelines.runs.file_side import side_of
from dmquant.pipelines.runs.image_stage import FP, save_inputs
from dmquant.pipelines.runs.loaded_parts import LoadedParts
from dmquant.pipelines.runs.run import images_line, save_settings
from dmquant.pipelines.runs.run_report import build_report, write_all_reports
from dmquant.pipelines.runs.runfolder import RunFolder, claim, is_full_disk
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.sides import FullPrecision, Quantized, fingerprints_of, shared_parts
from dmquant.pipelines.runs.source import resumed_source


class Comparison:
    """A full-precision side, and a quantized side for each recipe; `settings` differ in their recipe only."""

    def __init__(self, settings: Mapping[str, Settings], source: Path, folder: RunFolder, console: Console):
        self.settings, self.folder, self.console = settings, folder, console
        self.common = next(iter(settings.values()))
        source = resumed_source(self.common, source, folder, console)
        # Offloading ties a part to the other parts of its pipeline, and so would keep the backbone of the last recipe.
        self.parts = LoadedParts(keeps=not self.common.offload)
        self.shared = shared_parts(self.common, source, folder)
        self.reference = FullPrecision(self.common, source, folder, console, self.parts)

    def finish(self) -> None:
        """Every recipe in turn, from where an earlier comparison stopped; one that fails does not stop the others.

        Raises UserError at the end if any failed.
        """
        recipes = {"recipes": {name: settings.recipe.to_dict() for name, settings in self.settings.items()}}
        self.folder.forget(runfolder.RECIPES)
        of_recipes = {name: fingerprints_of(each, self.reference) for name, each in self.settings.items()}
        fingerprints = {"fingerprints": self.reference.fingerprints | {"recipes": of_recipes}}
        record = self.common.to_dict(self.reference.source.sha256, recipes) | fingerprints
        save_settings(self.folder, record)
        self.console.say(f"{self.common.model.name}: {len(self.settings)} recipes; {images_line(self.common)}")
        if self.common.inputs:
            self.common.inputs.say(self.console)
        self.reference.images()
        # Scores come last: the networks they look through would count in the peak memory of the recipes after them.
        made = [name for name in self.settings if self._tried(name, Quantized.make)]
        self.parts.clear()
        finished = [name for name in made if self._tried(name, Quantized.score)]
        if finished:
            self.folder.finish(runfolder.RECIPES, fingerprint(recipes=finished), names=finished)
            processes.current().on_main(lambda: self._report(record))
        if len(finished) < len(self.settings):
            failed = [name for name in self.settings if name not in finished]
            raise UserError(
                f"{len(failed)} of {len(self.settings)} recipes failed ({', '.join(failed)}); "
                "the same command tries them again and keeps what is done"
            )

    def _tried(self, name: str, work: Callable[[Quantized], None]) -> bool:
        """Whether this part of a recipe's work could be done; why not is said."""
        settings, workspace = self.settings[name], self.folder.path / runfolder.CALIBRATION
        weights, activations = settings.formats
        self.console.say(f"{name}: weights {weights}, activations {activations}")

        def attempt() -> None:
            with claim(self.folder.recipe(name), settings.model.name) as folder:
                work(side_of(settings, self.reference, folder, workspace, shared=self.shared))

        try:
            processes.current().together(attempt)
        except UserError as error:
            if is_full_disk(error):
                raise
            self.console.say(f"recipe {name} failed: {error}")
            self.parts.clear()
            return False
        finally:
            _forget_compiled_code()
        return True

    def _report(self, record: dict[str, Any]) -> None:
        path, result = self.folder.path, build_report(self.folder, record)
        columns = {"full precision": self.folder.images(FP)}
        columns |= {name: path / recipe.images for name, recipe in result.recipes.items()}
        draw_grid(columns, self.common.prompts, path / runfolder.GRID, inputs=save_inputs(self.common, self.folder))
        draw_comparison(result, path / runfolder.PLOT)
        write_all_reports(self.folder, record, result, self.console)
        for table in comparison_tables(result):
            self.console.show(table)
        self.console.say(
            f"report: {path / 'report.html'}   grid: {path / runfolder.GRID}   plot: {path / runfolder.PLOT}   "
            f"models: {path / runfolder.RECIPES}"
        )


def _forget_compiled_code() -> None:
    """torch.compile keeps a limited number of variants of a function a process; every recipe starts without any."""
    gc.collect()
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
