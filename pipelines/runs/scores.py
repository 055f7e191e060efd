"""The score stage: what has to be computed anew, and where it goes: the run's memory, and scores.csv image by image."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmquant.evaluation.images import any_images, generated_images, image_sha256
from dmquant.evaluation.metrics.compute import score_pairs, score_reference
from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.result import Metric
from dmquant.evaluation.scores_csv import columns, write_scores
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint, sha256
from dmquant.pipelines.runs.runfolder import SCORES, RunFolder
from dmquant.pipelines.runs.settings import Settings

STAGE = "scores"
OF_REFERENCE = "_full_precision"  # ends the columns of what full precision itself scored


def complete_scores(
    folder: RunFolder, sides: Mapping[Path, list[str]], settings: Settings, networks: Networks, console: Console
) -> None:
    """Compute the scores that are missing.

    `sides` are the image folders, full precision first, with the keys of the images that are in them.
    """
    fp, quantized = sides
    key = scores_key({path.name: keys for path, keys in sides.items()}, settings)
    record = processes.current().on_main(lambda: _kept(folder, key, generated_names(quantized), settings))
    wanted = [name for name in settings.metrics if name not in record["metrics"]]
    if not wanted:
        console.say("scores: already there")
        return
    began = time.perf_counter()
    metrics, reference = processes.current().together(
        lambda: make_scores(fp, quantized, wanted, settings.real, networks, console, settings.prompts)
    )[0]
    seconds = time.perf_counter() - began
    of_images = {name: metric.values for name, metric in metrics.items()}
    of_images |= {name + OF_REFERENCE: metric.values for name, metric in reference.items()}
    write_table(folder.path / SCORES, quantized, settings.prompts, of_images)
    table = processes.current().on_main(lambda: table_sha256(folder))
    folder.finish(
        STAGE,
        key,
        metrics=record["metrics"] | _as_json(metrics),
        reference=record["reference"] | _as_json(reference),
        seconds=record["seconds"] + seconds,
        clip=settings.clip,
        table_sha256=table,
    )
    console.say(f"scores: {', '.join(wanted)} in {seconds:.1f} s; of each image: {folder.path / SCORES}")


def make_scores(
    fp: Path,
    quantized: Path,
    metrics: Sequence[str],
    real: Path | None,
    networks: Networks,
    console: Console,
    prompts: Sequence[str] | None,
) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """The metrics of the quantized images against full precision, and those that full precision itself has.

    Without `prompts` the images are asked for theirs.
    """
    with console.bar("scores") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar(done, total, what)

        return (
            score_pairs(fp, quantized, metrics, real, networks, progress, prompts),
            score_reference(fp, metrics, real, networks, progress, prompts),
        )


def scores_key(images: Mapping[str, list[str]], settings: Settings) -> str:
    """Fingerprint of what scores depend on: the keys of the images of both sides, and the content of the real ones."""
    return fingerprint(images=images, real=None if settings.real is None else _contents(settings.real))


def write_table(
    path: Path, images: Path, prompts: tuple[str, ...], values: Mapping[str, tuple[float, ...] | None]
) -> None:
    """Add the metrics that have a value an image to the CSV at `path`; the main process does."""
    given = {name: column for name, column in values.items() if column is not None}
    if given:
        names = generated_names(images)
        processes.current().on_main(lambda: write_scores(path, names, prompts, given))


def generated_names(folder: Path) -> list[str]:
    """The file names of the images in `folder`, in order."""
    return [path.name for path in generated_images(folder)]


def _kept(folder: RunFolder, key: str, names: list[str], settings: Settings) -> dict[str, Any]:
    """The record of the stage with only those metrics that hold for these settings and have their images' values."""
    record = folder.finished(STAGE, key)
    if record is None:
        return {"metrics": {}, "reference": {}, "seconds": 0.0}
    table = columns(folder.path / SCORES, names) or {} if table_holds(folder, record) else {}

    def holds(name: str, metric: dict[str, Any]) -> bool:
        if metric["value"] is None or (METRICS[name].per_image and name not in table):
            return False
        return "clip" not in METRICS[name].needs or record.get("clip") == settings.clip

    known = {name: metric for name, metric in record["metrics"].items() if name in METRICS}
    metrics = {name: metric for name, metric in known.items() if holds(name, metric)}
    reference = {name: metric for name, metric in record["reference"].items() if name in metrics}
    return {"metrics": metrics, "reference": reference, "seconds": record["seconds"]}


def table_sha256(folder: RunFolder) -> str | None:
    """SHA-256 of scores.csv; None where there is none."""
    try:
        return sha256(folder.path / SCORES)
    except OSError:
        return None


def table_holds(folder: RunFolder, record: Mapping[str, Any]) -> bool:
    """Whether scores.csv is what was written with the record of the stage; versions up to 0.2 recorded no hash."""
    return "table_sha256" not in record or record["table_sha256"] == table_sha256(folder)


def _as_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def _contents(folder: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of every image in a folder."""
    return [(path.relative_to(folder).as_posix(), image_sha256(path)) for path in any_images(folder)]
