"""report.md: the report for a terminal, a code host or a message."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dmquant.evaluation.report import wording
from dmquant.evaluation.result import Measured, Report
from dmquant.host.text import escaped, visible

MARKUP = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"[\\|`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>"),
        (r"&(?=#?\w+;)", "&amp;"),
        ("<", "&lt;"),
        ("://", "&#58;//"),  # an address that stands alone would become a link
        (r"(?<=www)\.", "&#46;"),
        (r"(?<=\S)@(?=\S)", "&#64;"),
        (r"^([#>]|[+-](?=\s|$)|[-=]{2,})", r"\\\1"),  # what begins a block where it stands first
        (r"^(\d+)(?=[.)](?:\s|$))", r"\1\\"),
    )
)
"""What is markup in a line, and what shows the same characters."""


def render_markdown(folder: Path, report: Report) -> str:
    """The report as Markdown; `folder` is where it will lie, for the grid."""
    parts = [f"# {cell(wording.title(report))}", cell(wording.summary(report))]
    if (folder / "grid.png").is_file():
        parts.append("![Image pairs: full precision and quantized](grid.png)")
    if (folder / "compare.png").is_file():
        parts.append("![Quality of every recipe against its bits a weight](compare.png)")
    parts += ["## Size and cost", markdown_table(wording.FACTS_HEADER, wording.facts(report))]
    if len(report.recipes) > 1:
        parts += ["## Metrics", _overview(report)]
    for name, variant in wording.scored(report).items():
        parts += [f"## Metrics: {cell(name)}", _metrics(variant)]
    parts += ["## Recipes", markdown_table(("", *report.recipes), wording.recipe_settings(report))]
    parts += [f"## Repeat it\n\n{fenced(visible(report.command))}"] if report.command else []
    parts += [f"## Settings\n\nImage pairs share prompt, seed and initial noise. {len(report.prompts)} prompts."]
    parts += [markdown_table(("setting", "value"), ((key, str(value)) for key, value in report.settings.items()))]
    parts += [markdown_table(("package", "version"), report.versions.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(report: Report) -> str:
    """A row a variant, a column a metric, values only."""
    titles = wording.metric_titles(report)
    rows = (
        (variant_title, *(wording.metric_short(name, variant.metrics.get(name)) for name in titles))
        for variant_title, variant in wording.scored(report).items()
    )
    return markdown_table(("", *titles.values()), rows)


def _metrics(variant: Measured) -> str:
    header = ("metric", "value", "95 % interval", "median and worst", "images", "backbone", "note")
    return markdown_table(
        header,
        (
            (
                wording.metric_title(name, metric),
                wording.metric_value(name, metric),
                wording.metric_interval(name, metric),
                wording.metric_spread(name, metric),
                str(metric.images) if metric.value is not None else "",
                wording.backbone_text(metric.backbone),
                metric.note or "",
            )
            for name, metric in variant.metrics.items()
        ),
    )


def cell(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would take for markup, a link or mathematics escaped."""
    text = visible(" ".join(str(text).split()))
    for pattern, instead in MARKUP:
        text = pattern.sub(instead, text)
    return text


def code(text: str) -> str:
    """`text` on one line as inline code, in which nothing is markup."""
    text = visible(" ".join(str(text).split()))
    ticks, pad = "`" * (_longest_run(text) + 1), " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """Lines of `text` as a block of code, which nothing in them ends."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{escaped(text).rstrip()}\n{ticks}"


def _longest_run(text: str) -> int:
    """The number of backticks that follow one another at most."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or "" without rows."""
    body = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    if not body:
        return ""
    return "\n".join([f"| {' | '.join(map(cell, header))} |", "|" + " --- |" * len(header), *body])
