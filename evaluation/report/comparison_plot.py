"""A plot of the cost and the quality of each recipe: compare.png."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes

from dmquant.evaluation.metrics.kind import Kind
from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.pareto_front import pareto_front
from dmquant.evaluation.report.plot_style import (
    COLOURS,
    better_upwards,
    linear_ticks,
    literal,
    logarithmic_ticks,
    panels,
    plain,
    save,
)
from dmquant.evaluation.result import Metric, RecipeResult, Report
from dmquant.host import owned

MARKERS = "osD^vPX*"
FRONT = "#a9abb8"
PANEL_WIDTH, LABEL_WIDTH = 4.2, 2.4  # inches
LOG_MARGIN = 1.5  # a factor on both sides
FINE_DECADES = 2  # up to this many, a logarithmic axis is labelled 1, 2, 5, 10
STEP = 0.035  # share of the axis between points that stand side by side
SAME_BITS = 0.005
LABEL_HEIGHT = 0.22  # inches a line of text takes
HEIGHT = 4.2  # inches, for as many recipes as it has room to label
OUTSIDE_AXES = 1.2  # inches of the height that title and axis labels take


def draw_comparison(report: Report, out: Path, metric: str | None = None) -> bool:
    """Draw a metric with its 95 % intervals against bits a weight, time and latent MSE, and write the PNG to `out`.

    Without `metric` it is the first of METRICS that any recipe has: PSNR if that was computed.
    Better is higher up; a line joins the Pareto front: the recipes than which none of fewer or equal bits, or of less
    or equal time, is better. Recipes without the metric are left out, and so is the panel of time where no recipe was
    timed beside full precision, and that of latent MSE where fewer than two recipes have one (above 0: the axis is
    logarithmic) and where it is the metric itself. Returns whether there was anything to draw;
    where not, an older picture of ours at `out` is removed.
    """
    metric = metric or _first_metric(report)
    recipes = {name: recipe for name, recipe in report.recipes.items() if _value(recipe, metric) is not None}
    if not recipes:
        owned.remove(out)
        return False
    kind = METRICS[metric]
    measured = [recipe.metrics[metric] for recipe in recipes.values()]
    values = [one.value for one in measured]
    bits = [recipe.bits_per_weight for recipe in recipes.values()]
    latents = [_value(recipe, "latent_mse") or None for recipe in recipes.values()]
    times = [recipe.relative_time for recipe in recipes.values()]
    costs = [("bits a weight in all (equal ones side by side)", "linear", _side_by_side(bits))]
    fronts = [bits]
    if any(times):
        costs.append(("time an image, full precision being 1", "linear", times))
        fronts.append(times)
    if metric != "latent_mse" and sum(latent is not None for latent in latents) > 1:
        costs.append(("latent MSE (less is better)", "log", latents))
    height = max(HEIGHT, OUTSIDE_AXES + LABEL_HEIGHT * len(recipes))
    figure, axes = panels(len(costs), len(costs) * PANEL_WIDTH + LABEL_WIDTH, height, values)
    for axis, (title, scale, xs) in zip(axes, costs, strict=True):
        _panel(axis, title, scale, xs, measured)
    line = {"color": FRONT, "linewidth": 1.2, "zorder": 1}
    for axis, cost, (_, _, xs) in zip(axes, fronts, costs, strict=False):
        known = [index for index, one in enumerate(cost) if one is not None]
        front = pareto_front([cost[i] for i in known], [kind.sign * values[i] for i in known])
        steps = [(xs[known[i]], values[known[i]]) for i in front]
        axis.plot(*zip(*steps, strict=True), drawstyle="steps-post", **line)
    if any(times):
        axes[1].axvline(1.0, linestyle=":", **line)
    if max(bits) - min(bits) < SAME_BITS:  # what keeps the points apart is no scale
        axes[0].set_xticks([bits[0]], [f"{bits[0]:.2f}"])
    better_upwards(axes[0], kind, measured[0].backbone and measured[0].backbone.name)
    about = "bars are 95 % intervals, " if any(one.low is not None for one in measured) else ""
    figure.suptitle(
        f"{literal(report.model)}: {measured[0].images} images, {about}the line is the Pareto front", fontsize=11
    )
    _label(axes[-1], {name: one.value for name, one in zip(recipes, measured, strict=True)}, kind, height)
    save(figure, out)
    return True


def _panel(axis: Axes, title: str, scale: str, xs: list[float | None], measured: list[Metric]) -> None:
    axis.set_xscale(scale)
    plain(axis, title)
    axis.margins(x=0.12, y=0.08)
    if scale == "log":
        _label_decades(axis, [x for x in xs if x is not None])
    else:
        linear_ticks(axis)
    for x, one, (colour, marker) in zip(xs, measured, _looks(), strict=False):
        if x is None:
            continue
        low, high = (one.value if bound is None else bound for bound in (one.low, one.high))
        reach = [[max(one.value - low, 0.0)], [max(high - one.value, 0.0)]]
        axis.errorbar(x, one.value, yerr=reach, fmt=marker, color=colour, markersize=7, capsize=3, elinewidth=1.2)


def _label_decades(axis: Axes, xs: list[float]) -> None:
    low, high = min(xs) / LOG_MARGIN, max(xs) * LOG_MARGIN
    axis.set_xlim(low, high)
    fine = high / low < 10**FINE_DECADES
    logarithmic_ticks(axis, (1, 2, 5) if fine else (1,))


def _side_by_side(xs: list[float]) -> list[float]:
    """`xs` with those that nearly coincide moved apart around their place, so that their intervals can be told."""
    step = STEP * ((max(xs) - min(xs)) or 1.0)
    moved = list(xs)
    rest = sorted(range(len(xs)), key=xs.__getitem__)
    while rest:
        together = [index for index in rest if xs[index] - xs[rest[0]] < step]
        for place, index in enumerate(sorted(together)):
            moved[index] = xs[index] + (place - (len(together) - 1) / 2) * step
        rest = rest[len(together) :]
    return moved


def _label(axis: Axes, values: dict[str, float], kind: Kind, height: float) -> None:
    """Write the recipes' names to the right of the axis, best first, each joined to the height of its point."""
    looks = dict(zip(values, _looks(), strict=False))
    line = LABEL_HEIGHT / (height - OUTSIDE_AXES)
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = {name: float(to_axes.transform((axis.get_xlim()[0], value))[1]) for name, value in values.items()}
    ranked = sorted(heights, key=heights.__getitem__, reverse=True)
    for name, y in zip(ranked, _spread([heights[name] for name in ranked], line, 0.0, 1.0), strict=True):
        colour, marker = looks[name]
        beside = {"transform": axis.transAxes, "color": colour, "clip_on": False}
        axis.plot([1.01, 1.05], [heights[name], y], linewidth=0.8, **beside)
        axis.plot(1.075, y, marker, markersize=6, **beside)
        axis.text(1.11, y, f"{literal(name)}  {kind.number(values[name])}", va="center", fontsize=9, **beside)


def _spread(wanted: list[float], line: float, bottom: float, top: float) -> list[float]:
    """Heights as near to the wanted ones (highest first) as lines of text can stand without touching."""
    heights: list[float] = []
    for index, height in enumerate(wanted):
        lowest_allowed = bottom + line * (len(wanted) - index - 0.5)
        below_last = heights[-1] - line if heights else top - line / 2
        heights.append(min(max(height, lowest_allowed), below_last))
    return heights


def _looks() -> Iterator[tuple[str, str]]:
    """Colour and marker of one recipe after another; no two alike among the first 64."""
    for turn in range(len(MARKERS)):
        for index, colour in enumerate(COLOURS):
            yield colour, MARKERS[(index + turn) % len(MARKERS)]


def _first_metric(report: Report) -> str:
    computed = (name for name in METRICS if any(_value(recipe, name) is not None for recipe in report.recipes.values()))
    return next(computed, next(iter(METRICS)))


def _value(recipe: RecipeResult, name: str) -> float | None:
    metric = recipe.metrics.get(name)
    return None if metric is None else metric.value
