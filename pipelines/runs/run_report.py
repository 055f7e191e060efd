"""The report of a run, built from what its folder remembers."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dmquant.diffusers.families import families
from dmquant.errors import UserError
from dmquant.evaluation.metrics.registry import needing
from dmquant.evaluation.report.files import write_report
from dmquant.evaluation.result import LayerError, Metric, RecipeResult, Reference, Report
from dmquant.evaluation.scores_csv import columns
from dmquant.evaluation.step_errors import step_errors
from dmquant.host import checksums, owned
from dmquant.host.console import Console
from dmquant.host.files import fingerprint, write_text
from dmquant.pipelines.models.loading import DTYPES
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.batch_mates import batch_mates, with_batch_mates
from dmquant.pipelines.runs.card import scored_card
from dmquant.pipelines.runs.components import described
from dmquant.pipelines.runs.image_stage import INPUTS
from dmquant.pipelines.runs.published import published, published_metric
from dmquant.pipelines.runs.runfolder import RECIPES, RunFolder
from dmquant.pipelines.runs.scores import OF_REFERENCE, generated_names, table_holds
from dmquant.settings import format_name

SHOWN_FILES = 4
NOT_TAKEN = "not taken by the pipeline"


def build_report(folder: RunFolder, settings: dict[str, Any]) -> Report:
    """The report of a finished run or comparison; `settings` is what its run.yaml holds."""
    with reading_records(folder):
        sides = quantized_sides(folder, settings)
        side, _ = next(iter(sides.values()))
        reference = Reference(
            dtype=settings["dtype"],
            size_bytes=side.record("model")["full_precision_bytes"],
            seconds=_seconds(folder, "fp"),
            peak_memory_bytes=_peak(folder, "fp"),
            batch_mates=batch_mates(folder, "fp"),
            metrics=_metrics(side.record("scores")["reference"], settings["metrics"], _values(side), OF_REFERENCE),
        )
        report = Report(
            model=settings["model"]["name"],
            reference=reference,
            recipes={
                name: _result(folder, side, recipe, settings["metrics"], _fingerprints(settings, name))
                for name, (side, recipe) in sides.items()
            },
            prompts=settings["prompts"],
            settings=_flat_settings(folder, side, published(settings)),
            versions=settings["versions"],
            command=published(settings)["command"],
            inputs=_inputs(folder, settings),
        )
        report.check()
    return report


@contextlib.contextmanager
def reading_records(folder: RunFolder) -> Iterator[None]:
    """UserError where a record of a run does not hold what a run records: it is damaged, or of another version."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"the records of the run in {folder.path} are damaged ({type(error).__name__}: {error}): "
            "run its command again with --overwrite"
        ) from error


def _inputs(folder: RunFolder, settings: dict[str, Any]) -> dict[str, str]:
    """The folders of the images that went into the pipeline, relative to the run's, by what they are."""
    given = settings.get("inputs", {})
    found = {name: folder.images(kind) for kind, name in INPUTS.items() if kind in given}
    return {name: path.relative_to(folder.path).as_posix() for name, path in found.items()}


def write_all_reports(folder: RunFolder, settings: dict[str, Any], report: Report, console: Console) -> None:
    """The report's files, and a card with the scores for every model of it."""
    with console.bar("report") as bar:
        write_report(folder.path, report, lambda what, done, total: bar(done, total, what))
    for name, (side, recipe) in quantized_sides(folder, settings).items():
        if "file" in recipe:
            continue  # it has no folder of its own here
        path = side.path / runfolder.MODEL / "README.md"
        card = scored_card(report, name, settings["model"]["pipeline"], str(DTYPES[settings["dtype"]]))
        with owned.joined(side.path):
            if path.read_text(encoding="utf-8") != card:
                write_text(path, card)
            checksums.rewritten(path.parent, [path.name])


def unfinished(folder: RunFolder, settings: dict[str, Any]) -> list[str]:
    """The stages that are not done in a run or a comparison under the settings of its run.yaml."""
    absent = [] if folder.holds("images_fp", settings.get("fingerprints")) else ["images_fp"]
    if "recipes" in settings and not folder.record(RECIPES):
        return [*absent, RECIPES]
    of_side = ("model", "images_quantized", "scores")
    for name, (side, _) in quantized_sides(folder, settings).items():
        fingerprints = _fingerprints(settings, name)
        stages = [stage for stage in of_side if not side.holds(stage, fingerprints)]
        if "scores" not in stages and not (
            _are_scored(side.record("scores"), settings) and table_holds(side, side.record("scores"))
        ):
            stages.append("scores")
        absent += [f"{stage} of {name}" if "recipes" in settings else stage for stage in stages]
    return absent


def _fingerprints(settings: dict[str, Any], recipe: str) -> dict[str, str] | None:
    """Fingerprints of the settings of one recipe, by stage; None in a run.yaml of an earlier version."""
    given = settings.get("fingerprints")
    return given["recipes"][recipe] if given and "recipes" in settings else given


def _are_scored(record: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a record of scores has all metrics of the settings, through their networks."""
    listed = set(settings["metrics"])
    same_clip = record.get("clip") == settings.get("clip") or not listed & set(needing("clip"))
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
    mates, metrics = batch_mates(side, "quantized"), _metrics(scores["metrics"], listed, _values(side))
    return RecipeResult(
        weights=_formats(recipe, "weights"),
        activations=_formats(recipe, "activations"),
        bits_per_weight=model["bits_per_weight"],
        size_bytes=model["size_bytes"],
        images=side.images("quantized").relative_to(folder.path).as_posix(),
        seconds={
            "quantize": model["seconds"],
            **_seconds(side, "quantized"),
            "score": scores["seconds"],
        },
        relative_time=_relative_time(folder, side),
        peak_memory_bytes=_peak(side, "quantized"),
        quantize_peak_memory_bytes=model.get("peak_memory_bytes"),
        batch_mates=mates,
        metrics=with_batch_mates(metrics, batch_mates(folder, "fp"), mates),
        settings=_recipe_settings(side, recipe),
        recipe=recipe,
        layers=[LayerError(**layer) for layer in layers],
        steps=step_errors(folder.images("fp"), side.images("quantized")),
    )


def _formats(recipe: dict[str, Any], of: str) -> str:
    """The name of the format of weights or activations; files of others have names of their own."""
    return recipe[of] if "file" in recipe else format_name(recipe[of])


def _metrics(
    stored: dict[str, Any], listed: list[str], values: Mapping[str, list[float]], suffix: str = ""
) -> dict[str, Metric]:
    """The listed metrics that are stored, with the values of their images, whose columns end in `suffix`."""
    metrics = {name: published_metric(Metric.from_json(stored[name])) for name in listed if name in stored}
    return {
        name: replace(metric, values=tuple(values[name + suffix])) if name + suffix in values else metric
        for name, metric in metrics.items()
    }


def _values(side: RunFolder) -> dict[str, list[float]]:
    """The metrics that have a value an image, from scores.csv."""
    return columns(side.path / runfolder.SCORES, generated_names(side.images("quantized"))) or {}


def _seconds(folder: RunFolder, side: str) -> dict[str, float]:
    """The seconds that the images of a side took; nothing where those of some are not known."""
    seconds = folder.notes(f"seconds_{side}")
    known = len(seconds) >= folder.record(f"images_{side}").get("images", 0)
    return {"generate": sum(seconds.values())} if seconds and known else {}


def _relative_time(folder: RunFolder, side: RunFolder) -> float | None:
    """The median seconds of a quantized image over full precision's, of images that one process made of both sides.

    None where there are none: in between, the machine may have become faster or slower.
    """
    sides = [_seconds_by_session(folder, "fp"), _seconds_by_session(side, "quantized")]
    together = max(sides[0].keys() & sides[1].keys(), key=lambda session: len(sides[1][session]), default=None)
    if together is None:
        return None
    full, quantized = (statistics.median(one[together]) for one in sides)
    return quantized / full


def _seconds_by_session(folder: RunFolder, side: str) -> dict[str, list[float]]:
    seconds, found = folder.notes(f"seconds_{side}"), {}
    for key, session in folder.notes(f"sessions_{side}").items():
        if key in seconds:
            found.setdefault(session, []).append(seconds[key])
    return found


def _peak(folder: RunFolder, side: str) -> int | None:
    return folder.record(f"images_{side}")["peak_memory_bytes"]


def _flat_settings(folder: RunFolder, side: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that repeat the run, each a plain value."""
    family = families().get(settings["model"].get("family"))
    guidance = family.guidance_argument if family else "guidance_scale"
    images, dequantized = settings["images"], settings["model"].get("source_quantized") == "dequantize"
    return {
        "source": settings["model"]["source"] + (", dequantized" if dequantized else ""),
        **({"LoRAs fused": "; ".join(loras)} if (loras := settings["model"].get("loras")) else {}),
        "prompts": settings["prompt_set"],
        "prompts (sha256)": settings["prompts_sha256"],
        "prompts cut": folder.notes(runfolder.CUT_PROMPTS).get("line") or "none",
        "images": images["count"],
        "seed": f"{images['seed']} + image number",
        "steps": images.get("num_inference_steps", NOT_TAKEN),
        "guidance": images.get(guidance, NOT_TAKEN),
        "size": f"{images['width']}x{images['height']}",
        **({"frames": images["num_frames"]} if images.get("num_frames", 1) > 1 else {}),
        "batch size": images["batch_size"],
        "each image as alone": "to the bit" if images.get("deterministic") else "but for rounding",
        **_of_inputs(settings.get("inputs")),
        "device": settings["device"],
        "dtype": settings["dtype"],
        "peak memory is": side.record("images_quantized")["peak_memory_of"] or "not measured",
        "real images": settings["real"] or "none",
    }


def _of_inputs(inputs: dict[str, Any] | None) -> dict[str, Any]:
    """What repeats the run of a pipeline that takes images."""
    if inputs is None:
        return {}
    net = inputs["controlnet"]
    of_kinds = {INPUTS[kind]: inputs[kind] for kind in INPUTS if kind in inputs}
    return {
        "pipeline": inputs["pipeline"],
        **({"strength": inputs["strength"]} if "strength" in inputs else {}),
        **({"ControlNet": f"{net['source']}, in full precision"} if net else {}),
        **{f"{name} images": _few(list(dict.fromkeys(files))) for name, files in of_kinds.items()},
        "input images (sha256)": fingerprint(sha256=inputs["sha256"]),
    }


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more


def _recipe_settings(side: RunFolder, recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of one recipe's model, each a plain value."""
    made, images = side.record("model"), side.record("images_quantized")
    not_finite = "not recorded" if images["not_finite"] is None else images["not_finite"]
    quantized = (
        f"{made['layers']} layers, {made['quantized_weights']} of {made['parameters']} weights, "
        f"{made['bits_per_quantized_weight']:.3f} bits each"
    )
    if "file" in recipe:
        return {
            "recipe": f"none: {recipe['file']}, quantized by others",
            "written as": f"{recipe['format']}; {_with_options(recipe['dialect'])}".removesuffix("; "),
            "formats": _in_layers(made["formats"]),
            "quantized": quantized,
            "kernels": "dequantized, and inputs rounded as its engine does",
            "weights (sha256)": ", ".join(made["sha256"].values()),
            "images with NaN or infinity": not_finite,
        }
    weights = [digest for name, digest in made["sha256"].items() if name.endswith(".safetensors")]
    return {
        "recipe": recipe["name"],
        "rounding": _with_options(recipe["rounding"], "method"),
        **({"calibration": _with_options(recipe["calibration"], "sampler")} if "calibration" in recipe else {}),
        "formats": _in_layers(made["formats"]),
        "granularity": f"weights {recipe['granularity']}, activations {recipe['activation_granularity']}",
        "scale rule": f"{recipe['scale']}, stored as {recipe['store']}",
        "quantized": quantized,
        **{name: described(facts) for name, facts in made.get("components", {}).items()},
        "kernels": _in_layers(images.get("kernels") or {}) or "not recorded",
        "weights (sha256)": ", ".join(weights),
        "images with NaN or infinity": not_finite,
    }


def _in_layers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} in {count} layers" for name, count in sorted(counts.items()))


def _with_options(given: dict[str, Any], first: str | None = None) -> str:
    """The value of one key, then the others by name: "adaround, regularizer 0.01"."""
    head = [] if first is None else [str(given[first])]
    return ", ".join([*head, *(f"{key} {value}" for key, value in given.items() if key != first)])
