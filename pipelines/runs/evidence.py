"""What is known of a model that is exported: the scores of its run, if they are of these weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from dmquant.errors import UserError
from dmquant.evaluation.result import RecipeResult, Report
from dmquant.evaluation.scores_csv import columns
from dmquant.host import checksums, json_file
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.image_stage import FP, QUANTIZED
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.scores import generated_names

REPORT = "report.json"


@dataclass(frozen=True)
class Evidence:
    """A finished run of the model: its report, the model's name in it, and the folders of the images."""

    report: Report
    name: str
    full_precision: Path
    quantized: Path
    values: dict[str, list[float]]
    """The metrics that have a value an image, by name."""

    @property
    def result(self) -> RecipeResult:
        return self.report.recipes[self.name]


def evidence_of(model: Path, component: str) -> Evidence | str:
    """The evidence of the run that the folder `model` is of, or why there is none; `component` is the backbone."""
    side = model.resolve().parent
    if not runfolder.is_run(side):
        return "the model is in no run folder"
    root = next((each for each in (side, side.parent.parent) if (each / REPORT).is_file()), None)
    if root is None:
        return "the run has no report yet: give its command again"
    try:
        report = Report.from_json(json_file.read_object(root / REPORT))
        name = _named(report, root, side)
        if name is None or not _is_of(report.recipes[name], model, component):
            return "the report of the run is of another model"
    except (UserError, LookupError, TypeError, ValueError, json.JSONDecodeError) as error:
        return f"the report of the run cannot be read ({error})"
    images = RunFolder(side).images(QUANTIZED)
    values = columns(side / runfolder.SCORES, generated_names(images)) or {}
    return Evidence(report, name, RunFolder(root).images(FP), images, values)


def _named(report: Report, root: Path, side: Path) -> str | None:
    """The recipe of the report whose images lie on this side."""
    images = side / runfolder.IMAGES / QUANTIZED
    return next((name for name, one in report.recipes.items() if (root / one.images).resolve() == images), None)


def _is_of(result: RecipeResult, model: Path, component: str) -> bool:
    """Whether the scores are of the weights that the model's checksums name."""
    of_backbone = (
        entry["sha256"]
        for name, entry in checksums.recorded(model).items()
        if name.startswith(f"{component}/") and name.endswith(checksums.WEIGHTS)
    )
    return set(of_backbone) == set(str(result.settings.get("weights (sha256)", "")).split(", "))
