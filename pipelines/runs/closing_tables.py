"""The tables on the terminal that close a command."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from dmquant.evaluation.report.wording import (
    FACTS_HEADER,
    facts,
    metric_interval,
    metric_short,
    metric_title,
    metric_titles,
    shown_metrics,
    variants,
)
from dmquant.evaluation.result import Metric, Report
from dmquant.host.units import size_text, time_text

METRICS_A_TABLE = 5  # beside one another in a terminal


def closing_table(report: Report) -> Table:
    """Full precision and every recipe side by side, metrics below."""
    table = Table(title=report.model, title_justify="left")
    rows = facts(report)
    table.add_column("")
    for row in rows:
        table.add_column(row[0])
    for title, *values in zip(FACTS_HEADER[1:], *(row[1:] for row in rows), strict=True):
        table.add_row(title, *values)
    table.add_section()
    titles = metric_titles(report)
    measured = [variant.metrics for variant in variants(report).values()]
    for name in shown_metrics(report):
        table.add_row(titles[name], *(_cell(name, metrics) for metrics in measured))
    return _with_reasons(table, measured)


def comparison_tables(report: Report) -> list[Table]:
    """A row a variant: what it stores, its size and how long it took to make, and its metrics above their intervals.

    Metrics that do not fit beside the first ones have tables of their own.
    """
    names = {"": list(variants(report))}
    formats, sizes, times = [], [], []
    for row, variant in zip(facts(report), variants(report).values(), strict=True):
        _, weights, activations, bits, _, _, image, *_ = row
        formats.append(f"{weights}\n{activations}")
        sizes.append(f"{bits}\n{size_text(variant.size_bytes)}")
        seconds = variant.seconds.get("quantize")
        times.append(f"{'' if seconds is None else time_text(seconds)}\n{image}")
    made = {
        "weights\nactivations": formats,
        "bits\nsize": sizes,
        "quantizing took\nan image takes": times,
    }
    titles, shown = metric_titles(report), shown_metrics(report)
    scores = {
        titles[name]: [_stacked_cell(name, variant.metrics.get(name)) for variant in variants(report).values()]
        for name in shown
    }
    first = METRICS_A_TABLE - 1
    rest = list(scores.items())[first:]
    parts = [rest[start : start + METRICS_A_TABLE] for start in range(0, len(rest), METRICS_A_TABLE)]
    shown_tables = [
        _table(report.model, {**names, **made, **dict(list(scores.items())[:first])}),
        *(_table("", {**names, **dict(part)}) for part in parts),
    ]
    _with_reasons(shown_tables[-1], [variant.metrics for variant in variants(report).values()])
    return shown_tables


def _table(title: str, cells_by_header: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for header, cells in cells_by_header.items():
        table.add_column(
            header, overflow="fold", min_width=max(len(line) for cell in cells for line in cell.split("\n"))
        )
    for row in zip(*cells_by_header.values(), strict=True):
        table.add_row(*row)
    return table


def _stacked_cell(name: str, metric: Metric | None) -> str:
    interval = "" if metric is None else metric_interval(name, metric).replace(" to ", "–")
    return "\n".join(filter(None, (metric_short(name, metric), interval)))


def metrics_table(metrics: dict[str, Metric], reference: dict[str, Metric]) -> Table:
    """The metrics of one set of images beside those that full precision itself has."""
    table = Table("metric", "full precision", "quantized", "images")
    for name, metric in metrics.items():
        table.add_row(
            metric_title(name, metric), _cell(name, reference), _cell(name, metrics), str(metric.images or "")
        )
    return _with_reasons(table, [metrics, reference])


def _with_reasons(table: Table, measured: Sequence[Mapping[str, Metric]]) -> Table:
    """The table with a line below it for every reason why a metric was not computed."""
    names: dict[str, list[str]] = {}
    for metrics in measured:
        for name, metric in metrics.items():
            if metric.reason and name not in names.setdefault(metric.reason, []):
                names[metric.reason].append(name)
    lines = [f"{', '.join(listed)} not computed: {reason}" for reason, listed in names.items()]
    table.caption, table.caption_justify = "\n".join(lines) or None, "left"
    return table


def _cell(name: str, metrics: dict[str, Metric]) -> str:
    interval = metric_interval(name, metrics[name]) if name in metrics else ""
    return metric_short(name, metrics.get(name)) + (f"  ({interval})" if interval else "")
