"""The picture of a study: layers by calls of the backbone, and what each layer costs: sensitivity.png."""

import math
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmquant.evaluation.report.plot_style import COLOURS, DOTS_PER_INCH, LINES, literal, save
from dmquant.pipelines.choice.record import LayerCosts, Study

NAMED = 70  # layers that have room for their names
ROW, LEAST_HEIGHT, MOST_HEIGHT = 0.17, 3.0, 14.0  # inches
DECADES = 5  # of the colours; what costs less is as light as that


def draw(study: Study, out: Path) -> None:
    """Draw the estimates of each layer in each call as colours, in the order of the model, and beside them the layers'
    costs, measured and estimated, as a share of the power of the latents; write the PNG to `out`."""
    layers = list(study.layers.items())
    has_steps = all(layer.by_step for _, layer in layers)
    height = min(max(ROW * len(layers), LEAST_HEIGHT), MOST_HEIGHT)
    figure = Figure((11 if has_steps else 7, height + 1.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(1, 2 if has_steps else 1, squeeze=False, width_ratios=[3, 2] if has_steps else [1])[0]
    if has_steps:
        _heat(figure, axes[0], layers, study.power)
    _bars(axes[-1], layers, study.power)
    names = [literal(name) for name, _ in layers]
    axes[0].set_yticks(range(len(layers)), names if len(layers) <= NAMED else _first_of_blocks(names), fontsize=6)
    if has_steps:
        axes[1].set_yticks([])
    correlation = "" if study.correlation is None else f"; rank correlation of the two {study.correlation:.2f}"
    figure.suptitle(
        literal(f"{study.model}: what layers cost in {study.base}, {study.prompts} prompts{correlation}"), fontsize=10
    )
    save(figure, out)


def _heat(figure: Figure, axis: Axes, layers: list[tuple[str, LayerCosts]], power: float) -> None:
    values = numpy.array([layer.by_step for _, layer in layers]) / power
    top = math.log10(max(values.max(), 1e-30))
    logs = numpy.log10(numpy.maximum(values, 10 ** (top - DECADES)))
    image = axis.imshow(logs, aspect="auto", cmap="magma_r", interpolation="nearest", vmin=top - DECADES, vmax=top)
    calls = values.shape[1]
    axis.set_xticks(range(0, calls, max(1, calls // 10)), range(1, calls + 1, max(1, calls // 10)))
    axis.set_xlabel("call of the backbone, the noisiest first", fontsize=8)
    bar = figure.colorbar(image, ax=axis, location="bottom", fraction=0.03, pad=0.02)
    bar.set_label(
        "estimated share of the latents' power if the layer is quantized in that call alone, powers of ten", fontsize=8
    )


def _bars(axis: Axes, layers: list[tuple[str, LayerCosts]], power: float) -> None:
    rows = range(len(layers))
    measured = [(layer.measured or 0.0) / power for _, layer in layers]
    colours = [COLOURS[7] if layer.kept else COLOURS[0] for _, layer in layers]
    least = min((value for value in measured if value > 0), default=1e-12) / 2
    axis.barh(rows, [max(value, least) for value in measured], color=colours, height=0.75)
    axis.barh([0], [0], color=COLOURS[0], label="measured")
    estimated = [(place, layer.estimated / power) for place, (_, layer) in enumerate(layers) if layer.estimated]
    if estimated:
        places, values = zip(*estimated, strict=True)
        axis.plot(values, places, "|", color=COLOURS[1], markersize=6, label="to second order")
    axis.set_xscale("log")
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.grid(axis="x", color=LINES, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("share of the latents' power; grey: stays in high precision", fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _first_of_blocks(names: list[str]) -> list[str]:
    """The names of the first layers of blocks, and nothing for the others."""
    blocks = [".".join(name.split(".")[:2]) for name in names]
    return [block if place == 0 or block != blocks[place - 1] else "" for place, block in enumerate(blocks)]
