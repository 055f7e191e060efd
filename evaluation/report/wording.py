"""The text of a report: the same in Markdown, in HTML and on the terminal."""

from dmquant.evaluation.metrics.registry import METRICS, get_kind
from dmquant.evaluation.result import Backbone, Measured, Metric, RecipeResult, Reference, Report
from dmquant.host.units import size_text, time_text

NAMED = 3  # recipes that a title names; it counts more of them


def title(report: Report) -> str:
    """The subject of the report, in one line."""
    recipes = list(report.recipes)
    named = ", ".join(recipes) if len(recipes) <= NAMED else f"{len(recipes)} recipes"
    return f"{report.model}: {named} against full precision"


def summary(report: Report) -> str:
    """The savings and the cost of quantization, in a sentence or two."""
    if len(report.recipes) == 1:
        (recipe,) = report.recipes.values()
        return f"{_saving(recipe, report.reference)}{_cost_in_quality(recipe)}."
    smallest = min(report.recipes, key=lambda name: report.recipes[name].bits_per_weight)
    told = [f"{len(report.recipes)} recipes. Smallest: {smallest}, {_told(report.recipes[smallest])}"]
    ranked = {name: recipe.metrics["psnr"].value for name, recipe in report.recipes.items() if _has_psnr(recipe)}
    if ranked:
        closest = max(ranked, key=ranked.__getitem__)
        told.append(f"Closest to full precision: {closest}, {_told(report.recipes[closest])}")
    return ". ".join(told) + "."


def _saving(recipe: RecipeResult, reference: Reference) -> str:
    return (
        f"The backbone takes {size_text(recipe.size_bytes)} instead of {size_text(reference.size_bytes)} in 16 bit: "
        f"{recipe.bits_per_weight:.2f} bits a weight, {reference.size_bytes / recipe.size_bytes:.2f} times smaller"
    )


def _cost_in_quality(recipe: RecipeResult) -> str:
    if not _has_psnr(recipe):
        return ""
    psnr = recipe.metrics["psnr"]
    interval = metric_interval("psnr", psnr)
    return f". Its images are {metric_value('psnr', psnr)} PSNR from full precision" + (
        f" (95 %: {interval}), as a mean over {psnr.images} pairs" if interval else ""
    )


def _told(recipe: RecipeResult) -> str:
    quality = f" and {metric_value('psnr', recipe.metrics['psnr'])} PSNR" if _has_psnr(recipe) else ""
    return f"{recipe.bits_per_weight:.2f} bits a weight{quality}"


def _has_psnr(recipe: RecipeResult) -> bool:
    return "psnr" in recipe.metrics and recipe.metrics["psnr"].value is not None


def metric_title(name: str, metric: Metric | None = None) -> str:
    """The metric's title and which way is better: "PSNR ↑", "CLIP score (emoji-clip) ↑"."""
    return get_kind(name).heading(metric.backbone.name if metric and metric.backbone else None)


def metric_titles(report: Report) -> dict[str, str]:
    """The title of every metric that any recipe lists, in the order of METRICS."""
    measured = [variant.metrics for variant in variants(report).values()]
    computed = {name: metric for metrics in measured for name, metric in metrics.items() if metric.value is not None}
    return {name: metric_title(name, computed.get(name)) for name in shown_metrics(report)}


def metric_value(name: str, metric: Metric) -> str:
    """The metric's value with its unit, or "not computed: <reason>"."""
    if metric.value is None:
        return f"not computed: {metric.reason}"
    return get_kind(name).text(metric.value)


def metric_short(name: str, metric: Metric | None) -> str:
    """The metric's value with its unit, "not computed" without the reason, or "" where it was not asked for."""
    if metric is None:
        return ""
    return "not computed" if metric.value is None else metric_value(name, metric)


def metric_interval(name: str, metric: Metric) -> str:
    """The 95 % interval as "low to high", or "" where there is none."""
    if metric.low is None or metric.high is None:
        return ""
    number = get_kind(name).number
    return f"{number(metric.low)} to {number(metric.high)}"


def metric_spread(name: str, metric: Metric) -> str:
    """The median and the mean of the worst 5 % of the images, or "" where the metric has none."""
    if metric.median is None or metric.worst is None:
        return ""
    number = get_kind(name).number
    return f"median {number(metric.median)}, worst 5 % {number(metric.worst)}"


def backbone_text(backbone: Backbone | None) -> str:
    """The backbone's name and the first digits of its hash, or ""."""
    return "" if backbone is None else f"{backbone.name}, sha256 {backbone.sha256[:12]}"


FACTS_HEADER = (
    *("", "weights", "activations", "bits per weight", "size on disk", "compression"),
    *("time an image", "peak memory", "time"),
)


def facts(report: Report) -> list[tuple[str, ...]]:
    """Rows under FACTS_HEADER: full precision, then each recipe."""
    reference = report.reference
    return [
        _reference_facts(reference),
        *(_recipe_facts(name, recipe, reference) for name, recipe in report.recipes.items()),
    ]


def shown_metrics(report: Report) -> list[str]:
    """The metrics that any recipe lists, in the order of METRICS; raises UserError for one that is not known here."""
    listed = {get_kind(name).name for recipe in report.recipes.values() for name in recipe.metrics}
    return [name for name in METRICS if name in listed]


def recipe_settings(report: Report) -> list[tuple[str, ...]]:
    """Settings of the recipes: a row for each setting, its name first, then a cell for each recipe."""
    recipes = report.recipes.values()
    names = dict.fromkeys(name for recipe in recipes for name in recipe.settings)
    return [(name, *(str(recipe.settings.get(name, "")) for recipe in recipes)) for name in names]


def scored(report: Report) -> dict[str, Measured]:
    """The variants that have any metric."""
    return {name: variant for name, variant in variants(report).items() if variant.metrics}


def variants(report: Report) -> dict[str, Measured]:
    """Full precision and the recipes under the names they are shown by, in that order."""
    return {report.reference.name: report.reference, **report.recipes}


def _reference_facts(reference: Reference) -> tuple[str, ...]:
    return (
        reference.name,
        reference.dtype,
        reference.dtype,
        "",
        f"{size_text(reference.size_bytes)} in 16 bit",
        "1.00×",
        "1.00×",
        *_cost(reference),
    )


def _recipe_facts(name: str, recipe: RecipeResult, reference: Reference) -> tuple[str, ...]:
    return (
        name,
        recipe.weights,
        recipe.activations,
        f"{recipe.bits_per_weight:.2f}",
        size_text(recipe.size_bytes),
        f"{reference.size_bytes / recipe.size_bytes:.2f}×",
        time_an_image(recipe),
        *_cost(recipe),
    )


def time_an_image(recipe: RecipeResult) -> str:
    """Times full precision's, or "" where that was not measured."""
    return "" if recipe.relative_time is None else f"{recipe.relative_time:.2f}×"


def _cost(measured: Measured) -> tuple[str, str]:
    memory = {"": measured.peak_memory_bytes, "quantizing ": getattr(measured, "quantize_peak_memory_bytes", None)}
    told = ", ".join(f"{stage}{size_text(most)}" for stage, most in memory.items() if most is not None)
    return told, ", ".join(f"{stage} {time_text(seconds)}" for stage, seconds in measured.seconds.items())
