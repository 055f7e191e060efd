"""The common style of plots of quality against cost: colours, panels side by side, axes, and files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dmquant.evaluation.metrics.kind import Kind
from dmquant.host.files import replacing
from dmquant.host.text import visible

COLOURS = ("#2457c5", "#c5472a", "#2a8a4a", "#8a4ab8", "#b8860b", "#1f8a99", "#a83a74", "#5f6068")
LINES = "#e4e4ea"
LOG_FROM = 20  # a metric whose values span this factor gets a logarithmic axis
DOTS_PER_INCH = 150


def panels(count: int, width: float, height: float, values: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `width` x `height` inches with panels side by side, whose common vertical axis suits `values`."""
    figure = Figure((width, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes[0].set_yscale("log")
    return figure, axes


def plain(axis: Axes, title: str) -> None:
    """A panel's title, a light grid behind the points, and no frame."""
    axis.set_xlabel(title)
    axis.grid(color=LINES, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def linear_ticks(axis: Axes) -> None:
    """Few round numbers along the horizontal axis."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6))


def logarithmic_ticks(axis: Axes, steps: tuple[int, ...]) -> None:
    """Plain numbers at these multiples of the powers of ten along the horizontal axis."""
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, position: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def better_upwards(axis: Axes, kind: Kind, network: str | None = None) -> None:
    """Name the vertical axis after the metric, with better values higher up."""
    if kind.better == "lower":
        axis.invert_yaxis()
    title = kind.heading(network)[:-2]  # the arrow would point nowhere here
    axis.set_ylabel(f"{title}{f', {kind.unit.strip()}' if kind.unit else ''}")


def literal(text: str) -> str:
    """A name as a plot shows it: without mathematics between dollar signs, and on one line."""
    return visible(text).replace("$", r"\$")


def save(figure: Figure, out: Path) -> None:
    """Write the figure to `out` as PNG, whole or not at all."""
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")
