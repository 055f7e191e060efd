"""The rows of a report as text, the same for Markdown and HTML."""

from dataclasses import dataclass

from dmquant.evaluation.result import Backbone, Measured, Metric, RecipeResult, Reference, Report


@dataclass(frozen=True)
class Style:
    """How a metric is printed: its title, unit, number format, and which way is better."""

    title: str
    unit: str
    digits: str
    better: str


STYLES = {
    "psnr": Style("PSNR", " dB", ".2f", "higher"),
    "ssim": Style("SSIM", "", ".4f", "higher"),
    "latent_mse": Style("Latent MSE", "", "#.3g", "lower"),  # from 1e-6 to 1
    "lpips": Style("LPIPS", "", ".4f", "lower"),
    "fid_fp": Style("FID against full precision", "", ".2f", "lower"),
    "fid_real": Style("FID against real images", "", ".2f", "lower"),
    "kid_fp": Style("KID against full precision", "", ".4f", "lower"),
    "cmmd_fp": Style("CMMD against full precision", "", ".4f", "lower"),
    "clip_score": Style("CLIPScore", "", ".2f", "higher"),
    "hpsv2": Style("HPSv2", "", ".4f", "higher"),
}
NAMED = 3  # recipes that a title names; it counts more of them
ARROWS = {"higher": "↑", "lower": "↓"}


def title(report: Report) -> str:
    """What the report is about, in one line."""
    recipes = list(report.recipes)
    named = ", ".join(recipes) if len(recipes) <= NAMED else f"{len(recipes)} recipes"
    return f"{report.model}: {named} against full precision"


def metric_title(name: str) -> str:
    """The metric's title and which way is better: "PSNR ↑"."""
    style = STYLES[name]
    return f"{style.title} {ARROWS[style.better]}"


def metric_value(name: str, metric: Metric) -> str:
    """The metric's value with its unit, or "not computed: <reason>"."""
    if metric.value is None:
        return f"not computed: {metric.reason}"
    style = STYLES[name]
    return f"{metric.value:{style.digits}}{style.unit}"


def metric_short(name: str, metric: Metric | None) -> str:
    """The metric's value with its unit, "not computed" without the reason, or "" where it was not asked for."""
    if metric is None:
        return ""
    return "not computed" if metric.value is None else metric_value(name, metric)


def metric_interval(name: str, metric: Metric) -> str:
    """The 95 % interval as "low to high", or "" where there is none."""
    if metric.low is None or metric.high is None:
        return ""
    digits = STYLES[name].digits
    return f"{metric.low:{digits}} to {metric.high:{digits}}"


def backbone_text(backbone: Backbone | None) -> str:
    """The backbone's name and the first digits of its hash, or ""."""
    return "" if backbone is None else f"{backbone.name}, sha256 {backbone.sha256[:12]}"


def size_text(count: int) -> str:
    """`count` bytes in decimal units, three significant digits or so: "12.3 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if value < 10 else 1}f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def time_text(seconds: float) -> str:
    """A duration: "4.2 s", "3 min 5 s" or "2 h 7 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


FACTS_HEADER = ("", "weights", "activations", "bits per weight", "size on disk", "compression", "peak memory", "time")


def facts(report: Report) -> list[tuple[str, ...]]:
    """One row under FACTS_HEADER for full precision, then one a recipe."""
    reference = report.reference
    return [
        _reference_facts(reference),
        *(_recipe_facts(name, recipe, reference) for name, recipe in report.recipes.items()),
    ]


def shown_metrics(report: Report) -> list[str]:
    """The metrics that any recipe lists, in the order of STYLES."""
    listed = {name for recipe in report.recipes.values() for name in recipe.metrics}
    return [name for name in STYLES if name in listed]


def recipe_settings(report: Report) -> list[tuple[str, ...]]:
    """What each recipe did: one row a setting, its name first, then a cell a recipe."""
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
        *_cost(recipe),
    )


def _cost(measured: Measured) -> tuple[str, str]:
    memory = "" if measured.peak_memory_bytes is None else size_text(measured.peak_memory_bytes)
    return memory, ", ".join(f"{stage} {time_text(seconds)}" for stage, seconds in measured.seconds.items())
