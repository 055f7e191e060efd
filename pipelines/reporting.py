"""The report of a run, built from what its folder remembers, and the tables that close a command."""

from typing import Any

from rich.table import Table

from dmquant.evaluation.report_tables import (
    FACTS_HEADER,
    facts,
    metric_interval,
    metric_title,
    metric_value,
    shown_metrics,
)
from dmquant.evaluation.result import Metric, RecipeResult, Reference, Report
from dmquant.pipelines.runfolder import RunFolder
from dmquant.pipelines.settings import format_name


def build_report(folder: RunFolder, settings: dict[str, Any]) -> Report:
    """The report of a finished run; `settings` is what its run.yaml holds."""
    model, scores, recipe = folder.record("model"), folder.record("scores"), settings["recipe"]
    listed = settings["metrics"]
    reference = Reference(
        dtype=settings["dtype"],
        size_bytes=model["full_precision_bytes"],
        seconds={"generate": _seconds(folder, "fp")},
        peak_memory_bytes=_peak(folder, "fp"),
        metrics=_metrics(scores["reference"], listed),
    )
    result = RecipeResult(
        weights=format_name(recipe["weights"]),
        activations=format_name(recipe["activations"]),
        bits_per_weight=model["bits_per_weight"],
        size_bytes=model["size_bytes"],
        seconds={
            "quantize": model["seconds"],
            "generate": _seconds(folder, "quantized"),
            "score": scores["seconds"],
        },
        peak_memory_bytes=_peak(folder, "quantized"),
        metrics=_metrics(scores["metrics"], listed),
    )
    return Report(
        model=settings["model"]["name"],
        reference=reference,
        recipes={recipe["name"]: result},
        prompts=settings["prompts"],
        settings=_flat_settings(folder, settings),
        versions=settings["versions"],
    )


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
    for name in shown_metrics(report):
        columns = (report.reference.metrics, *(recipe.metrics for recipe in report.recipes.values()))
        table.add_row(metric_title(name), *(_cell(name, metrics) for metrics in columns))
    return table


def metrics_table(metrics: dict[str, Metric], reference: dict[str, Metric]) -> Table:
    """The metrics of one set of images beside those that full precision itself has."""
    table = Table("metric", "full precision", "quantized", "images")
    for name, metric in metrics.items():
        table.add_row(metric_title(name), _cell(name, reference), _cell(name, metrics), str(metric.images or ""))
    return table


def _cell(name: str, metrics: dict[str, Metric]) -> str:
    if name not in metrics:
        return ""
    interval = metric_interval(name, metrics[name])
    return metric_value(name, metrics[name]) + (f"  ({interval})" if interval else "")


def _metrics(stored: dict[str, Any], listed: list[str]) -> dict[str, Metric]:
    return {name: Metric.from_json(stored[name]) for name in listed if name in stored}


def _seconds(folder: RunFolder, side: str) -> float:
    return sum(folder.notes(f"seconds_{side}").values())


def _peak(folder: RunFolder, side: str) -> int | None:
    return folder.record(f"images_{side}")["peak_memory_bytes"]


def _flat_settings(folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat the run, one value a line."""
    model, recipe, images = settings["model"], settings["recipe"], settings["images"]
    made = folder.record("model")
    weights = [digest for name, digest in model["sha256"].items() if name.endswith(".safetensors")]
    return {
        "source": model["source"],
        "weights (sha256)": ", ".join(weights),
        "recipe": recipe["name"],
        "granularity": f"weights {recipe['granularity']}, activations {recipe['activation_granularity']}",
        "scale rule": f"{recipe['scale']}, stored as {recipe['store']}",
        "quantized": f"{made['layers']} layers, {made['quantized_weights']} of {made['parameters']} weights, "
        f"{made['bits_per_quantized_weight']:.3f} bits each",
        "images": images["count"],
        "seed": f"{images['seed']} + image number",
        "steps": images["num_inference_steps"],
        "guidance": images["guidance_scale"],
        "size": f"{images['width']}x{images['height']}",
        "batch size": images["batch_size"],
        "device": settings["device"],
        "dtype": settings["dtype"],
        "peak memory is": folder.record("images_quantized")["peak_memory_of"] or "not measured",
        "images with NaN or infinity": folder.record("images_quantized")["not_finite"] or 0,
        "real images": settings["real"] or "none",
    }
