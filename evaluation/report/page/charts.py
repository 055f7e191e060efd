"""Charts as inline SVG, placed in percent so that they fill any width while their text keeps its size."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dmquant.evaluation.report.page.markup import escape
from dmquant.evaluation.result import LayerError, RecipeResult, Report

FINE_DECADES = 2  # up to this many, the logarithmic axis is labelled 1, 2, 5, 10
SMALLEST, LARGEST = 1e-100, 1e100  # beyond them ratios and powers of ten are no numbers any more
MARGIN = 1.25  # a factor above and below the points
X_TICKS = 6
COLOURS = 8  # that page.css knows
Place = Callable[[float, float], tuple[str, str]]  # x and y as the SVG has them


@dataclass(frozen=True)
class Point:
    """A point and its caption."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one colour, in order along the x axis; `line` joins them."""

    name: str
    points: Sequence[Point]
    line: bool = False


def log_chart(about: str, x_title: str, series: Sequence[Series]) -> str:
    """A chart with a logarithmic y axis, or "" where no point is above 0 and finite; others cannot be shown."""
    series = [
        Series(one.name, [point for point in one.points if SMALLEST < point.y < LARGEST], one.line) for one in series
    ]
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    left, right = min(point.x for point in points), max(point.x for point in points)
    low, high = min(point.y for point in points) / MARGIN, max(point.y for point in points) * MARGIN

    def place(x: float, y: float) -> tuple[str, str]:
        across = (x - left) / ((right - left) or 1.0)
        up = math.log(y / low) / math.log(high / low)
        return f"{100 * across:.2f}%", f"{100 * (1 - up):.2f}%"

    axes = [*_y_axis(low, high, place, left), *_x_axis(left, right, place, low)]
    marks = [mark for number, one in enumerate(series) for mark in _marks(one, number % COLOURS, place)]
    legend = "".join(
        f'<li class="c{number % COLOURS}">{escape(one.name)}</li>' for number, one in enumerate(series) if one.points
    )
    return (
        f'<figure class="chart"><ul class="legend">{legend}</ul>\n'
        f'<svg role="img" tabindex="0" aria-label="{escape(about)}">\n{"".join(axes)}\n{"".join(marks)}\n</svg>\n'
        f'<figcaption>{escape(x_title)}</figcaption><output class="readout" aria-live="polite"></output></figure>'
    )


def layer_chart(recipe: str, layers: Sequence[LayerError]) -> str:
    """Relative squared error of every quantized layer, in network order."""
    weights = [Point(i, layer.weight_error, _layer_text(i, layer)) for i, layer in enumerate(layers, start=1)]
    outputs = [
        Point(i, layer.output_error, _layer_text(i, layer))
        for i, layer in enumerate(layers, start=1)
        if layer.output_error is not None
    ]
    series = [Series("weight", weights), Series("output, with what came in from the layers before", outputs)]
    return log_chart(
        f"Relative squared error of each quantized layer, {recipe}",
        f"quantized layers in network order, 1 to {len(layers)}; vertical: relative squared error",
        series,
    )


def step_chart(report: Report) -> str:
    """Latent error after every step of the sampler, a line a recipe."""
    series = [Series(name, _steps(name, recipe), line=True) for name, recipe in report.recipes.items()]
    return log_chart(
        "Mean squared difference of the latents after each step of the sampler",
        "steps of the sampler; vertical: latent MSE against full precision",
        series,
    )


def _steps(name: str, recipe: RecipeResult) -> list[Point]:
    return [
        Point(
            step.step,
            step.latent_mse,
            f"{name}, step {step.step} (timestep {step.timestep:g}): latent MSE {step.latent_mse:.3g}"
            + (f", {step.latent_mse / step.latent_power:.2%} of the latents' power" if step.latent_power else ""),
        )
        for step in recipe.steps
    ]


def _layer_text(number: int, layer: LayerError) -> str:
    output = "" if layer.output_error is None else f", output error {layer.output_error:.3g}"
    return f"{number}: {layer.name} ({layer.kind}, {layer.format}), weight error {layer.weight_error:.3g}{output}"


def _marks(series: Series, colour: int, place: Place) -> Iterable[str]:
    spots = [place(point.x, point.y) for point in series.points]
    if series.line:
        for (x1, y1), (x2, y2) in itertools.pairwise(spots):
            yield f'<line class="c{colour}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
    for (x, y), point in zip(spots, series.points, strict=True):
        yield f'<circle class="c{colour}" cx="{x}" cy="{y}" r="3"><title>{escape(point.text)}</title></circle>'


def _y_axis(low: float, high: float, place: Place, left: float) -> Iterable[str]:
    steps = (1, 2, 5) if high / low < 10**FINE_DECADES else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for value in (step * 10.0**decade for decade in decades for step in steps):
        if low <= value <= high:
            _, y = place(left, value)
            yield f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
            yield f'<text x="-8" y="{y}" dy=".32em" text-anchor="end">{value:g}</text>'


def _x_axis(left: float, right: float, place: Place, low: float) -> Iterable[str]:
    every = max(1, _round_number((right - left) / X_TICKS))
    ticks = [left, *range(math.ceil((left + every / 2) / every) * every, math.floor(right) + 1, every)]
    for tick in ticks:
        x, _ = place(tick, low)
        yield f'<text x="{x}" y="100%" dy="1.6em" text-anchor="middle">{tick:g}</text>'


def _round_number(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `value`."""
    power = 10 ** math.floor(math.log10(max(value, 1)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
