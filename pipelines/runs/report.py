"""The report of a run, built from what its folder remembers, and the tables that close a command."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from dmquant.evaluation.metrics import THROUGH_CLIP
from dmquant.evaluation.report_files import write_report
from dmquant.evaluation.report_tables import (
    FACTS_HEADER,
    facts,
    metric_interval,
    metric_short,
    metric_title,
    metric_titles,
    shown_metrics,
    size_text,
    time_text,
    variants,
)
from dmquant.evaluation.result import LayerError, Metric, RecipeResult, Reference, Report
from dmquant.evaluation.score_table import columns
from dmquant.evaluation.step_errors import step_errors
from dmquant.host.console import Console
from dmquant.host.files import write_text
from dmquant.pipelines.models.loading import DTYPES
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.card import scored_card
from dmquant.pipelines.runs.runfolder import RECIPES, RunFolder
from dmquant.pipelines.runs.scores import OF_REFERENCE, generated_names
from dmquant.pipelines.runs.settings import format_name

METRICS_A_TABLE = 5  # beside one another in a terminal


def build_report(folder: RunFolder, settings: dict[str, Any]) -> Report:
    """The report of a finished run or comparison; `settings` is what its run.yaml holds."""
    sides = quantized_sides(folder, settings)
    side, _ = next(iter(sides.values()))
    reference = Reference(
        dtype=settings["dtype"],
        size_bytes=side.record("model")["full_precision_bytes"],
        seconds={"generate": _seconds(folder, "fp")},
        peak_memory_bytes=_peak(folder, "fp"),
        metrics=_metrics(side.record("scores")["reference"], settings["metrics"], _values(side), OF_REFERENCE),
    )
    return Report(
        model=settings["model"]["name"],
        reference=reference,
        recipes={
            name: _result(folder, side, recipe, settings["metrics"], _fingerprints(settings, name))
            for name, (side, recipe) in sides.items()
        },
        prompts=settings["prompts"],
        settings=_flat_settings(folder, side, settings),
        versions=settings["versions"],
        command=settings.get("command", ""),
    )


def write_all_reports(folder: RunFolder, settings: dict[str, Any], report: Report, console: Console) -> None:
    """The report's files, and a card with the scores for every model of it."""
    with console.bar("report") as bar:
        write_report(folder.path, report, lambda what, done, total: bar(done, total, what))
    for name, (side, _) in quantized_sides(folder, settings).items():
        path = side.path / runfolder.MODEL / "README.md"
        card = scored_card(report, name, settings["model"]["pipeline"], str(DTYPES[settings["dtype"]]))
        if path.read_text(encoding="utf-8") != card:
            write_text(path, card)


def unfinished(folder: RunFolder, settings: dict[str, Any]) -> list[str]:
    """The stages that are not done in a run or a comparison under the settings of its run.yaml."""
    absent = [] if folder.holds("images_fp", settings.get("fingerprints")) else ["images_fp"]
    if "recipes" in settings and not folder.record(RECIPES):
        return [*absent, RECIPES]
    of_side = ("model", "images_quantized", "scores")
    for name, (side, _) in quantized_sides(folder, settings).items():
        fingerprints = _fingerprints(settings, name)
        stages = [stage for stage in of_side if not side.holds(stage, fingerprints)]
        if "scores" not in stages and not _are_scored(side.record("scores"), settings):
            stages.append("scores")
        absent += [f"{stage} of {name}" if "recipes" in settings else stage for stage in stages]
    return absent


def _fingerprints(settings: dict[str, Any], recipe: str) -> dict[str, str] | None:
    """Of the settings of one recipe, by stage; None in a run.yaml of an earlier version."""
    given = settings.get("fingerprints")
    return given["recipes"][recipe] if given and "recipes" in settings else given


def _are_scored(record: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a record of scores has all metrics of the settings, through their networks."""
    listed = set(settings["metrics"])
    same_clip = record.get("clip") == settings.get("clip") or not listed & set(THROUGH_CLIP)
    return same_clip and listed <= record["metrics"].keys()


def quantized_sides(folder: RunFolder, settings: dict[str, Any]) -> dict[str, tuple[RunFolder, dict[str, Any]]]:
    """Folder and recipe of each quantized side that is finished, by the recipe's name."""
    if "recipes" in settings:
        names = folder.record(RECIPES)["names"]
        return {name: (RunFolder(folder.recipe(name)), settings["recipes"][name]) for name in names}
    return {settings["recipe"]["name"]: (folder, settings["recipe"])}


def _result(
    folder: RunFolder,
    side: RunFolder,
    recipe: dict[str, Any],
    listed: list[str],
    fingerprints: dict[str, str] | None,
) -> RecipeResult:
    model, scores = side.record("model"), side.record("scores")
    layers = side.record(runfolder.LAYERS)["layers"] if side.holds(runfolder.LAYERS, fingerprints) else []
    return RecipeResult(
        weights=format_name(recipe["weights"]),
        activations=format_name(recipe["activations"]),
        bits_per_weight=model["bits_per_weight"],
        size_bytes=model["size_bytes"],
        images=side.images("quantized").relative_to(folder.path).as_posix(),
        seconds={
            "quantize": model["seconds"],
            "generate": _seconds(side, "quantized"),
            "score": scores["seconds"],
        },
        peak_memory_bytes=_peak(side, "quantized"),
        metrics=_metrics(scores["metrics"], listed, _values(side)),
        settings=_recipe_settings(side, recipe),
        recipe=recipe,
        layers=[LayerError(**layer) for layer in layers],
        steps=step_errors(folder.images("fp"), side.images("quantized")),
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
    formats, sizes = [], []
    for (_, weights, activations, bits, *_), variant in zip(facts(report), variants(report).values(), strict=True):
        formats.append(f"{weights}\n{activations}")
        sizes.append(f"{bits}\n{size_text(variant.size_bytes)}")
    seconds = (variant.seconds.get("quantize") for variant in variants(report).values())
    made = {
        "weights\nactivations": formats,
        "bits\nsize": sizes,
        "quantizing\ntook": ["" if took is None else time_text(took) for took in seconds],
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


def _metrics(
    stored: dict[str, Any], listed: list[str], values: Mapping[str, list[float]], suffix: str = ""
) -> dict[str, Metric]:
    """The listed metrics that are stored, with the values of their images, whose columns end in `suffix`."""
    metrics = {name: Metric.from_json(stored[name]) for name in listed if name in stored}
    return {
        name: replace(metric, values=tuple(values[name + suffix])) if name + suffix in values else metric
        for name, metric in metrics.items()
    }


def _values(side: RunFolder) -> dict[str, list[float]]:
    """The metrics that have a value an image, from scores.csv."""
    return columns(side.path / runfolder.SCORES, generated_names(side.images("quantized"))) or {}


def _seconds(folder: RunFolder, side: str) -> float:
    return sum(folder.notes(f"seconds_{side}").values())


def _peak(folder: RunFolder, side: str) -> int | None:
    return folder.record(f"images_{side}")["peak_memory_bytes"]


def _flat_settings(folder: RunFolder, side: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat the run, one value a line."""
    images = settings["images"]
    return {
        "source": settings["model"]["source"],
        "prompts": settings["prompt_set"],
        "prompts (sha256)": settings["prompts_sha256"],
        "prompts cut": folder.notes(runfolder.CUT_PROMPTS).get("line") or "none",
        "images": images["count"],
        "seed": f"{images['seed']} + image number",
        "steps": images["num_inference_steps"],
        "guidance": images["guidance_scale"],
        "size": f"{images['width']}x{images['height']}",
        "batch size": images["batch_size"],
        "device": settings["device"],
        "dtype": settings["dtype"],
        "peak memory is": side.record("images_quantized")["peak_memory_of"] or "not measured",
        "real images": settings["real"] or "none",
    }


def _recipe_settings(side: RunFolder, recipe: dict[str, Any]) -> dict[str, Any]:
    """How one recipe made its model, one value a line."""
    made = side.record("model")
    weights = [digest for name, digest in made["sha256"].items() if name.endswith(".safetensors")]
    return {
        "recipe": recipe["name"],
        "rounding": _with_options(recipe["rounding"], "method"),
        **({"calibration": _with_options(recipe["calibration"], "sampler")} if "calibration" in recipe else {}),
        "formats": ", ".join(f"{name} in {count} layers" for name, count in sorted(made["formats"].items())),
        "granularity": f"weights {recipe['granularity']}, activations {recipe['activation_granularity']}",
        "scale rule": f"{recipe['scale']}, stored as {recipe['store']}",
        "quantized": f"{made['layers']} layers, {made['quantized_weights']} of {made['parameters']} weights, "
        f"{made['bits_per_quantized_weight']:.3f} bits each",
        "weights (sha256)": ", ".join(weights),
        "images with NaN or infinity": side.record("images_quantized")["not_finite"] or 0,
    }


def _with_options(given: dict[str, Any], first: str) -> str:
    """The value of one key, then the others by name: "adaround, regularizer 0.01"."""
    return ", ".join([str(given[first]), *(f"{key} {value}" for key, value in given.items() if key != first)])
