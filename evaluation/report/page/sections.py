"""The sections of report.html below its title, each from the report alone."""

import html
from collections.abc import Iterable, Sequence

from dmquant.evaluation.report import wording
from dmquant.evaluation.report.page.charts import layer_chart, step_chart
from dmquant.evaluation.report.page.gallery import Pairs
from dmquant.evaluation.report.page.markup import escape, table, text_row
from dmquant.evaluation.result import LayerError, Metric, RecipeResult, Report
from dmquant.host.text import yaml_text
from dmquant.host.units import size_text

TILE_METRICS = 4  # metrics that a report of one recipe shows in large figures
WORST_LAYERS = 20
CODE = "<td><code>{}</code></td>"
LAYERS = (
    "Squared error over the square of what is right, per layer. The output error is measured in the running backbone: "
    "what came in from the layers before it is part of it."
)
STEPS = "How far the latents are from those of full precision after each step, as a mean over the first images."


def tiles(report: Report) -> str:
    """The figures of a report of one recipe, large; several recipes have a plot instead."""
    if len(report.recipes) > 1:
        return ""
    (recipe,) = report.recipes.values()
    titles = wording.metric_titles(report)
    figures = [
        ("bits a weight", f"{recipe.bits_per_weight:.2f}", f"{recipe.weights}, activations {recipe.activations}"),
        (
            "times smaller",
            f"{report.reference.size_bytes / recipe.size_bytes:.2f}×",
            f"{size_text(recipe.size_bytes)} instead of {size_text(report.reference.size_bytes)}",
        ),
    ]
    computed = ((name, recipe.metrics.get(name)) for name in titles)
    computed = [(name, metric) for name, metric in computed if metric is not None and metric.value is not None]
    for name, metric in computed[:TILE_METRICS]:
        interval = wording.metric_interval(name, metric)
        below = f"95 %: {interval}" if interval else f"{metric.images} images"
        unbroken = "\N{NO-BREAK SPACE}".join(titles[name].rsplit(" ", 1))
        figures.append((unbroken, wording.metric_value(name, metric), below))
    shown = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(below)}</small></dd></div>"
        for title, value, below in figures
    )
    return f'<dl class="tiles">{shown}</dl>'


def pairs(report: Report, shown: Pairs) -> str:
    """The images, and what sorts and finds them: the page's script; without it they stand in their numbers' order."""
    return (
        f"<p>{escape(shown.about)}</p>\n"
        f'<div class="toolbar">{_recipe_choice(report)}<label>Sort by <select id="sort"></select></label>'
        '<label class="find">Find <input id="find" type="search" placeholder="part of a prompt"></label>'
        f'<output id="count"></output></div>\n<div class="pairs">\n{shown.figures}\n</div>\n'
        '<button id="more" hidden>Show all pairs</button>'
    )


def _recipe_choice(report: Report) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in report.recipes)
    hidden = " hidden" if len(report.recipes) == 1 else ""
    return f'<label{hidden}>Recipe <select class="recipe">{options}</select></label>'


def size(report: Report) -> str:
    """Bits, bytes, memory and time of every variant."""
    return table(wording.FACTS_HEADER, (text_row(row) for row in wording.facts(report)), "facts")


def metrics(report: Report) -> str:
    """A row a metric, with what all its numbers share, and a column a variant."""
    titles, variants = wording.metric_titles(report), wording.scored(report)
    if not titles:
        return "<p>None were asked for.</p>"
    rows = []
    for name, title in titles.items():
        said = [_said(name, variant.metrics[name]) for variant in variants.values() if name in variant.metrics]
        shared = [text for text in said[0] if all(text in others for others in said)]
        cells = (_metric_cell(name, of, variant.metrics.get(name), shared) for of, variant in variants.items())
        rows.append([f"<th scope=row>{escape(title)}{_small(shared)}</th>", *cells])
    return table(("metric", *variants), rows, "metrics")


def _said(name: str, metric: Metric) -> list[str]:
    """Remarks on a metric's number: its images, its network, its note; or why there is none."""
    if metric.value is None:
        return [wording.metric_value(name, metric)]
    texts = (f"{metric.images} images", wording.backbone_text(metric.backbone), metric.note)
    return [text for text in texts if text]


def _metric_cell(name: str, variant: str, metric: Metric | None, shared: Sequence[str]) -> str:
    """A value with its interval and spread, and its own remarks; on a phone the variant's name is above it."""
    if metric is None:
        return "<td></td>"
    own = [text for text in _said(name, metric) if text not in shared]
    if metric.value is None:
        return f'<td class="missing" data-of="{escape(variant)}">{_small(own) or "not computed"}</td>'
    interval = wording.metric_interval(name, metric)
    details = (f"95 %: {interval}" if interval else "", wording.metric_spread(name, metric), *own)
    return f'<td data-of="{escape(variant)}">{escape(wording.metric_value(name, metric))}{_small(details)}</td>'


def _small(texts: Iterable[str]) -> str:
    return "".join(f"<small>{escape(text)}</small>" for text in texts if text)


def layers(report: Report) -> str:
    """A chart and the worst layers, for each recipe whose layers were measured."""
    measured = {name: recipe.layers for name, recipe in report.recipes.items() if recipe.layers}
    if not measured:
        return ""
    parts = [
        f'<div class="of-recipe" data-name="{escape(name)}"><h3>{escape(name)}</h3>\n'
        f"{layer_chart(name, errors)}\n{_worst_layers(errors)}</div>"
        for name, errors in measured.items()
    ]
    return "\n".join([f"<p>{LAYERS}</p>", f'<div class="toolbar">{_recipe_choice(report)}</div>', *parts])


def _worst_layers(layers: Sequence[LayerError]) -> str:
    def error(layer: LayerError) -> float:
        return layer.weight_error if layer.output_error is None else layer.output_error

    worst = sorted(layers, key=error, reverse=True)[:WORST_LAYERS]
    rows = (
        text_row(
            (
                layer.name,
                layer.kind,
                layer.format,
                f"{layer.bits:.2f}",
                f"{layer.weight_error:.3g}",
                "" if layer.output_error is None else f"{layer.output_error:.3g}",
            )
        )
        for layer in worst
    )
    header = ("layer", "kind", "format", "bits a weight", "weight error", "output error")
    return (
        f"<details><summary>The {len(worst)} layers with the largest error</summary>"
        f"{table(header, rows, 'facts')}</details>"
    )


def steps(report: Report) -> str:
    """A chart of the error along the sampler's steps, where that was measured."""
    chart = step_chart(report)
    return f"<p>{STEPS}</p>\n{chart}" if chart else ""


def repeat(report: Report) -> str:
    """The command, what each recipe did, the recipes themselves, settings and versions."""
    recipes = "".join(_whole_recipe(name, recipe) for name, recipe in report.recipes.items())
    parts = [
        f"<pre><code>{escape(report.command)}</code></pre>" if report.command else "",
        table(("", *report.recipes), (text_row(row, CODE) for row in wording.recipe_settings(report))),
        recipes,
        '<div class="two">',
        table(("setting", "value"), (text_row(item, CODE) for item in report.settings.items())),
        table(("package", "version"), (text_row(item, CODE) for item in report.versions.items())),
        "</div>",
    ]
    return "\n".join(filter(None, parts))


def _whole_recipe(name: str, recipe: RecipeResult) -> str:
    if not recipe.recipe:
        return ""
    text = html.escape(yaml_text(recipe.recipe))
    return f"<details><summary>The whole recipe {escape(name)}</summary><pre><code>{text}</code></pre></details>"
