"""A sweep for people: the table on the terminal, and sweep.md."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dmquant.evaluation.report.markdown import cell, code, markdown_table
from dmquant.evaluation.report.wording import metric_interval, metric_short, metric_title
from dmquant.evaluation.result import Metric
from dmquant.host.units import size_text, time_text
from dmquant.pipelines.runs import runfolder

SHOWN = 60  # rows on a terminal; of more only the fronts and what failed
FRONT = "★"
HEADER = ("technique", "weights", "activations", "bits", "Gbitops", "area")


def terminal_table(title: str, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Table:
    """The rows of sweep.json; a star marks those that no other beats at some cost, which the last column names.

    Intervals are left to sweep.md: here they would take a second line of every row.
    """
    shown = rows if len(rows) <= SHOWN else [row for row in rows if row["pareto"] or row["error"]]
    left = "" if len(shown) == len(rows) else f": the {len(shown)} best at their cost of {len(rows)} trials"
    table = Table(title=title + left, title_justify="left")
    for column in ("", *HEADER):
        table.add_column(column, no_wrap=True)
    for column in (*(metric_title(name) for name in metrics), "took", "best at its"):
        table.add_column(column)
    for row in shown:
        star = FRONT if row["pareto"] else ""
        table.add_row(star, *_cells(row, metrics, with_interval=False), " ".join(row["pareto"]))
    return table


def page(data: dict[str, Any], command: str) -> str:
    """sweep.md: the fronts, then every trial, then what failed or was left out."""
    rows, metrics = data["trials"], data["metrics"]
    fronts = [row for row in rows if row["pareto"]]
    failed = [row for row in rows if row["error"]]
    images = data["settings"]["images"]
    parts = [
        f"# {cell(data['model'])}: {len(rows)} trials of the design space",
        f"{images['count']} images{_steps(images)} at {images['width']}x{images['height']}, "
        f"seed {images['seed']}, on {data['settings']['device']} in {data['settings']['dtype']}. "
        f"Made by {code(command)}.",
        f"![{data['metrics'][0]} against three costs]({runfolder.SWEEP_PLOT})",
        "Bits are those of a quantized weight with all its scales. Bit operations are weight bits times activation "
        "bits times multiply-accumulates of the quantized layers, in one call of the backbone for one image. Area "
        "counts the full-adder cells of one multiply-accumulate unit: a gate-count model of partial products, exponent "
        "adder and exact accumulator, not a synthesis result. Both leave out scales, of which a recipe with small "
        "groups of activations has more.",
        f"## Best {metric_title(metrics[0])} at its cost",
        _markdown(fronts, metrics, with_front=True),
        "## All trials",
        _markdown([row for row in rows if not row["error"]], metrics, with_front=False),
    ]
    if failed:
        parts += ["## Failed", "\n".join(f"- {cell(row['name'])}: {cell(row['error'])}" for row in failed)]
    if data["left_out"]:
        parts += [
            "## Left out",
            "\n".join(f"- {cell(name)}: {cell(reason)}" for name, reason in data["left_out"].items()),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _steps(images: dict[str, Any]) -> str:
    """The number of steps of an image, where the pipeline's call has an argument for it."""
    return f" of {images['num_inference_steps']} steps" if "num_inference_steps" in images else ""


def _markdown(rows: Sequence[dict[str, Any]], metrics: Sequence[str], with_front: bool) -> str:
    header = [*HEADER, *(metric_title(name) for name in metrics), "took"] + (["best at its"] if with_front else [])
    cells = ([*_cells(row, metrics), *([" ".join(row["pareto"])] if with_front else [])] for row in rows)
    return markdown_table(header, cells)


def _cells(row: dict[str, Any], metrics: Sequence[str], with_interval: bool = True) -> list[str]:
    bits = row["bits_per_quantized_weight"]
    area = row["area"]
    cells = [
        row["technique"],
        row["weights"],
        row["activations"],
        "" if bits is None else f"{bits:.2f}",
        f"{row['bit_operations'] / 1e9:.3g}",
        "" if area is None else f"{area:.1f}",
    ]
    if row["error"]:
        return [*cells, f"failed: {row['error']}", *[""] * (len(metrics) - 1), ""]
    qualities = (_quality(name, row["metrics"][name], with_interval) for name in metrics)
    return [*cells, *qualities, time_text(row["seconds"]["trial"])]


def _quality(name: str, stored: dict[str, Any], with_interval: bool) -> str:
    metric = Metric.from_json(stored)
    interval = metric_interval(name, metric) if with_interval else ""
    return metric_short(name, metric) + (f" ({interval})" if interval else "")


def memory_line(rows: Sequence[dict[str, Any]]) -> str:
    """The highest memory use of any trial, for people; "" where none was done."""
    peaks = {row["peak_memory_bytes"]: row for row in rows if row["peak_memory_bytes"]}
    if not peaks:
        return ""
    row = peaks[max(peaks)]
    return f"peak memory {size_text(max(peaks))} ({row['name']}; {row['peak_memory_of']})"
