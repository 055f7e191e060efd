"""The files of a study that people read: a page with its picture, a table of layers, and a recipe that keeps some."""

import csv
import io
from importlib.resources import files
from pathlib import Path
from string import Template

from dmquant.diffusers.families import Family
from dmquant.evaluation.report.page.markup import escape, table, text_row
from dmquant.evaluation.report.page.pictures import data_uri
from dmquant.host.console import Console
from dmquant.host.files import write_text
from dmquant.host.text import yaml_text
from dmquant.host.units import time_text
from dmquant.pipelines.choice.heat_map import draw
from dmquant.pipelines.choice.keeping import KeepList, keep_lists
from dmquant.pipelines.choice.record import Study, as_rows, decibels
from dmquant.pipelines.runs import runfolder

WORST, SAID = 15, 3  # layers on the page, and on the terminal
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="summary">$summary</p>
<img class="plot" alt="Layers by calls of the backbone, coloured by cost" src="$picture">
</header>
<main>
$sections
</main>
</body>
</html>
"""
)


def write_pages(study: Study, family: Family, folder: Path, console: Console) -> None:
    """Write the page, its picture, the table of layers and the recipe into the study's folder, and say what matters."""
    lists = keep_lists(study, family.name)
    draw(study, folder / runfolder.COSTS_PLOT)
    write_text(folder / runfolder.COSTS_TABLE, _csv(study))
    write_text(folder / runfolder.KEEP, _recipe(study, lists[0]))
    write_text(folder / runfolder.COSTS_PAGE, render(study, lists, (folder / runfolder.COSTS_PLOT).read_bytes()))
    rows = as_rows(study)[:SAID]
    worst = ", ".join(f"{row['layer']} {row['share']:.1%}" for row in rows)
    console.say(f"most of the error comes from {worst} of all layers' in {study.base}")
    if study.correlation is not None:
        console.say(f"estimates to second order rank layers as measurements do to {study.correlation:.3f} (Spearman)")
    console.say(f"page: {folder / runfolder.COSTS_PAGE}   recipe that keeps layers: {folder / runfolder.KEEP}")


def render(study: Study, lists: list[KeepList], picture: bytes) -> str:
    """The page, whole by itself; `picture` is the PNG of the heat map."""
    sections = [
        ("Worst layers", WORST_ABOUT, _worst(study)),
        ("Formats", FORMATS_ABOUT, _formats(study)),
        ("Inputs", "All quantized layers with inputs in a format, weights in full precision.", _inputs(study)),
        ("Ranges of timesteps", RANGES_ABOUT, _ranges(study)),
        ("Layers to leave alone", KEEP_ABOUT, _keep(lists)),
    ]
    shown = "\n".join(
        f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(about)}</p>\n{html}\n</section>"
        for title, about, html in sections
        if html
    )
    return PAGE.substitute(
        title=escape(f"What quantizing costs: {study.model}"),
        summary=escape(_summary(study)),
        style=(files("dmquant.evaluation.report.page") / "page.css").read_text(encoding="utf-8"),
        picture=data_uri(picture, "png"),
        sections=shown,
    )


WORST_ABOUT = (
    "One layer at a time, all else in full precision; costs are mean squared changes of the final latents. The "
    "estimate is to second order, from one pass back through the sampler. Inputs: an estimate, as the recipe has them."
)
FORMATS_ABOUT = (
    "All quantized layers in one format, measured, beside the sum of the layers' own costs: where the two are close, "
    "costs add up, and a choice by layers is sound. SNR is of the final latents."
)
RANGES_ABOUT = "All layers quantized in some calls of the backbone alone, the noisiest first."
KEEP_ABOUT = (
    "Shares of all weights of linear and convolution layers, and of all their error if they were quantized like the "
    "others. Proposed is what costs most for its size, up to 2 % of the weights; layers that cost less than their size "
    "would suggest need no keeping here. Lists of others are those that their sources name."
)


def _summary(study: Study) -> str:
    correlation = ""
    if study.correlation is not None:
        correlation = f" Estimates and measurements rank layers alike to {study.correlation:.3f} (Spearman)."
    took = ", ".join(f"{what} {time_text(seconds)}" for what, seconds in study.seconds.items())
    return (
        f"{len(study.layers)} layers in {len(study.formats)} formats under recipe {study.recipe}, on {study.prompts} "
        f"prompts of {study.steps} calls.{correlation} Time: {took}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _worst(study: Study) -> str:
    rows = [
        text_row(
            (
                row["layer"],
                f"{row['weights']:,}",
                f"{row['share']:.2%}",
                *(_number(row[name]) for name in ("measured", "estimated", "inputs")),
                row["kept"],
            )
        )
        for row in as_rows(study)[:WORST]
    ]
    return table(["layer", "weights", "share of the error", "measured", "to second order", "inputs", "kept"], rows)


def _formats(study: Study) -> str:
    rows = [
        text_row(
            (
                option,
                f"{study.bits(option):.3f}",
                _number(cost),
                _number(study.predicted(option)),
                f"{decibels(cost, study.power):.1f}",
            )
        )
        for option, cost in sorted(study.formats.items(), key=lambda item: study.bits(item[0]))
    ]
    return table(["weights", "bits a weight", "measured", "sum of layers", "SNR, dB"], rows)


def _inputs(study: Study) -> str:
    rows = [text_row((fmt, _number(cost), f"{decibels(cost, study.power):.1f}")) for fmt, cost in study.inputs.items()]
    return table(["inputs", "measured", "SNR, dB"], rows)


def _ranges(study: Study) -> str:
    rows = [
        text_row((f"{one.first + 1} to {one.last + 1}", _number(one.weights), _number(one.inputs)))
        for one in study.ranges
    ]
    return table(["calls", "weights", "inputs, as the recipe has them"], rows)


def _keep(lists: list[KeepList]) -> str:
    rows = [
        text_row((one.who, len(one.layers), f"{one.weights:.2%}", f"{one.error:.2%}", ", ".join(one.layers) or "none"))
        for one in lists
    ]
    return table(["list", "layers", "of the weights", "of the error", "which"], rows)


def _csv(study: Study) -> str:
    rows = as_rows(study)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _recipe(study: Study, proposed: KeepList) -> str:
    """Rules for a recipe that leave the proposed layers in high precision."""
    reason = (
        f"{proposed.weights:.2%} of the weights make {proposed.error:.1%} of the error of {study.model} in {study.base}"
    )
    rules = [{"match": list(proposed.layers), "keep": True, "reason": reason}] if proposed.layers else []
    about = f"# Rules to add to a recipe of your own for {study.model}: the layers of most cost for their size.\n"
    return about + yaml_text({"rules": rules}, width=120)
