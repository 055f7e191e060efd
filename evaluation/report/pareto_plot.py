"""A plot of a design space: quality against several costs, each with its Pareto front: sweep.png."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

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
from dmquant.evaluation.result import Metric
from dmquant.host import owned

MARKERS = {"fp": "o", "int": "s"}
OTHER_MARKER = "D"
KINDS = {"fp": "floating point", "int": "integer"}
FRONT = "#3b3d45"
PANEL_WIDTH, LEGEND_WIDTH, HEIGHT = 4.0, 2.0, 4.6  # inches
CROWD = 40  # points; of more, intervals would hide one another
SIZE, SMALL = 26, 14  # of markers, in points squared
NAMED = 8  # points of a front that have room for their names
MARGIN = 0.08  # share of the axis on both sides
LOG_COST_FROM = 4  # a cost whose values span this factor gets a logarithmic axis


@dataclass(frozen=True)
class Point:
    """A trial: the group and the kind that decide its looks, its label on the front, its costs and its quality."""

    group: str
    kind: str
    label: str
    costs: Mapping[str, float]
    quality: Metric


def draw_pareto(title: str, points: Sequence[Point], costs: Mapping[str, str], metric: str, out: Path) -> bool:
    """Draw `metric` against each of the `costs` (axis titles by name) side by side, and write the PNG to `out`.

    Better is higher up. Points without a value, and in a panel those without its cost, are left out, and so is a panel
    without points. Returns whether there was anything to draw; where not, an older picture at `out` is removed.
    """
    points = [point for point in points if point.quality.value is not None]
    shown = {cost: known for cost in costs if (known := [point for point in points if cost in point.costs])}
    if not shown:
        owned.remove(out)
        return False
    kind, values = METRICS[metric], [point.quality.value for point in points]
    figure, axes = panels(len(shown), PANEL_WIDTH * len(shown) + LEGEND_WIDTH, HEIGHT, values)
    groups = dict.fromkeys(point.group for point in points)
    colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
    for axis, (cost, known) in zip(axes, shown.items(), strict=True):
        _panel(axis, known, cost, costs[cost], colours, kind.sign)
    better_upwards(axes[0], kind)
    figure.legend(handles=_legend(points, colours), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(literal(title), fontsize=11)
    save(figure, out)
    return True


def _panel(axis: Axes, points: Sequence[Point], cost: str, title: str, colours: Mapping[str, str], sign: int) -> None:
    xs = [point.costs[cost] for point in points]
    plain(axis, title)
    axis.margins(y=0.08)
    if max(xs) / min(xs) > LOG_COST_FROM:
        axis.set_xscale("log")
        beyond = (max(xs) / min(xs)) ** MARGIN
        axis.set_xlim(min(xs) / beyond, max(xs) * beyond)
        logarithmic_ticks(axis, (1, 2, 5))
    else:
        beyond = MARGIN * (max(xs) - min(xs) or max(xs))
        axis.set_xlim(min(xs) - beyond, max(xs) + beyond)
        linear_ticks(axis)
    crowded = len(points) > CROWD
    for x, point in zip(xs, points, strict=True):
        value, look = point.quality.value, {"color": colours[point.group], "zorder": 3}
        if not crowded and point.quality.low is not None:
            axis.vlines(x, point.quality.low, point.quality.high, linewidth=0.9, alpha=0.5, color=look["color"])
        marker = MARKERS.get(point.kind, OTHER_MARKER)
        axis.scatter(x, value, SMALL if crowded else SIZE, marker=marker, alpha=0.6 if crowded else 0.9, **look)
    front = pareto_front(xs, [sign * point.quality.value for point in points])
    steps = [(xs[index], points[index].quality.value) for index in front]
    axis.plot(*zip(*steps, strict=True), color=FRONT, linewidth=1.1, drawstyle="steps-post", zorder=2)
    to_axes = axis.transData + axis.transAxes.inverted()
    for index in front[:: -(-len(front) // NAMED)]:
        x, value = xs[index], points[index].quality.value
        right = to_axes.transform((x, value))[0] > 0.5
        place = {"xytext": (-3, 4), "ha": "right"} if right else {"xytext": (3, 4), "ha": "left"}
        look = {"fontsize": 6.5, "color": FRONT, "zorder": 4}
        axis.annotate(literal(points[index].label), (x, value), textcoords="offset points", **look, **place)


def _legend(points: Sequence[Point], colours: Mapping[str, str]) -> list[Line2D]:
    lines = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=literal(group))
        for group, colour in colours.items()
    ]
    for kind in dict.fromkeys(point.kind for point in points):
        marker = MARKERS.get(kind, OTHER_MARKER)
        shape = {"marker": marker, "linestyle": "", "color": FRONT, "markerfacecolor": "none"}
        lines.append(Line2D([], [], label=KINDS.get(kind, kind), **shape))
    return [*lines, Line2D([], [], color=FRONT, label="Pareto front")]
