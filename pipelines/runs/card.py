"""README.md of a quantized pipeline whose images have been scored: what it is, what it costs, how to load it."""

import re
from typing import Any

from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.report import wording
from dmquant.evaluation.report.markdown import cell, code, fenced, markdown_table
from dmquant.evaluation.result import RecipeResult, Report
from dmquant.host.text import command_without_folders, visible, without_folders, yaml_text
from dmquant.pipelines.models.saving import NEEDS, fused_loras

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MEASURED = ("images", "seed", "steps", "guidance", "size", "dtype", "device", "real images")  # of a report's settings


def scored_card(report: Report, recipe_name: str, pipeline_class: str, dtype: str) -> str:
    """The model card of one recipe of a report; `dtype` is as torch prints it: "torch.bfloat16".

    Cards get published: the source is named where it is a Hub id, and of a path the name of its file is left.
    """
    recipe, source = report.recipes[recipe_name], str(report.settings.get("source", ""))
    on_hub = HUB_ID.fullmatch(source)
    task = "text-to-video" if "frames" in report.settings else "text-to-image"
    front = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": ["dmquant", "quantized", task, recipe.weights],
        **({"base_model": source, "base_model_relation": "quantized"} if on_hub else {}),
    }
    parts = [
        f"---\n{yaml_text(front)}---",
        NEEDS,
        f"# {cell(report.model)}, weights in {recipe.weights}, activations in {recipe.activations}",
        f"A diffusers `{pipeline_class}` whose backbone dmquant quantized with the recipe {code(recipe_name)}"
        + (f" from [{cell(source)}](https://huggingface.co/{source}). " if on_hub else ". ")
        + cell(wording.summary(_alone(report, recipe_name))),
        fused_loras(list(filter(None, [report.settings.get("LoRAs fused")]))).strip(),
        _loading(dtype),
        "## Scores",
        _how(report),
        _scores(report, recipe),
        "## Size and speed",
        markdown_table(wording.FACTS_HEADER, wording.facts(_alone(report, recipe_name))),
        _recipe(recipe),
        _repeat(command_without_folders(report.command, source if on_hub else "")),
        "## Versions",
        markdown_table(("package", "version"), report.versions.items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _alone(report: Report, recipe_name: str) -> Report:
    """The report of one of its recipes."""
    return Report(**{**vars(report), "recipes": {recipe_name: report.recipes[recipe_name]}})


def _loading(dtype: str) -> str:
    return f"""```python
import dmquant  # registers the quantizer with diffusers
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype={dtype})
```"""


def _how(report: Report) -> str:
    given: dict[str, Any] = {key: report.settings[key] for key in MEASURED if key in report.settings}
    told = "; ".join(f"{key}: {cell(without_folders(str(value)))}" for key, value in given.items())
    return f"The images of a pair share prompt, seed and initial noise. {told}."


def _repeat(command: str) -> str:
    return f"## Repeat it\n\n{fenced(visible(command))}" if command else ""


def _scores(report: Report, recipe: RecipeResult) -> str:
    """The computed metrics, with full precision's own score where it has one."""
    header = (
        "metric",
        "this model",
        "95 % interval",
        "median and worst",
        "full precision",
        "images",
        "through",
        "note",
    )
    rows = [
        (
            wording.metric_title(name, metric),
            wording.metric_value(name, metric),
            wording.metric_interval(name, metric),
            wording.metric_spread(name, metric),
            wording.metric_short(name, report.reference.metrics.get(name)),
            str(metric.images),
            wording.backbone_text(metric.backbone),
            metric.note or "",
        )
        for name, metric in ((name, recipe.metrics.get(name)) for name in METRICS)
        if metric is not None and metric.value is not None
    ]
    return markdown_table(header, rows) or "None were computed."


def _recipe(recipe: RecipeResult) -> str:
    if not recipe.recipe:
        return ""
    return f"## Recipe\n\n{fenced(yaml_text(recipe.recipe), 'yaml')}"
