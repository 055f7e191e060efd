"""The image pairs of the page: every image of a prompt, and the numbers they are sorted by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dmquant.evaluation.difference import open_alike, rms_difference
from dmquant.evaluation.images import STRIP, image_size, matching_images, number_of_frames
from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.report import wording
from dmquant.evaluation.report.page.markup import escape, json_script
from dmquant.evaluation.report.page.pictures import WebP, embed
from dmquant.evaluation.result import RecipeResult, Report

MOST_PAIRS, MOST_IMAGES = 400, 6000  # in a page; what does not fit into its size gets smaller before that
DIFFERENCE = "difference"


@dataclass(frozen=True)
class Pairs:
    """The pairs as HTML, ready to stand in the page; `about` says what is shown and how."""

    about: str
    figures: str
    data: str


def image_pairs(folder: Path, report: Report, progress: Progress = silent) -> Pairs:
    """The images of every prompt, or of as many as a page takes: those with the largest difference.

    Raises UserError when an image folder is missing or does not hold one readable image per prompt.
    """
    kinds = wording.variants(report)
    images = matching_images({name: folder / kind.images for name, kind in kinds.items()}, len(report.prompts))
    reference = images[report.reference.name]
    values = {name: _values(recipe, reference, images[name], progress) for name, recipe in report.recipes.items()}
    inputs = {name: folder / path for name, path in report.inputs.items()}
    beside = matching_images(inputs, len(report.prompts)) if inputs else {}
    each = len(images) + len(beside)
    shown = _shown([recipe[DIFFERENCE] for recipe in values.values()], min(MOST_PAIRS, MOST_IMAGES // each))
    chosen = [[paths[index] for index in shown] for paths in (*images.values(), *beside.values())]
    uris, encoding = embed([path for paths in zip(*chosen, strict=True) for path in paths], progress=progress)
    figures = []
    for place, index in enumerate(shown):
        files = {name: _link(paths[index], folder) for name, paths in images.items()}
        given = {name: _link(paths[index], folder) for name, paths in beside.items()}
        sources = uris[place * each : (place + 1) * each]
        figures.append(_figure(index, report.prompts[index], _size(reference[index]), files, given, sources))
    sorts = {name: _sort(name) for recipe in values.values() for name in recipe}
    data = {
        "reference": report.reference.name,
        "sorts": sorts,
        "values": {
            name: {key: [_finite(column[index]) for index in shown] for key, column in recipe.items()}
            for name, recipe in values.items()
        },
    }
    frames = min(number_of_frames(reference[0]), STRIP)
    return Pairs(
        _about(len(shown), len(report.prompts), encoding, frames), "\n".join(figures), json_script("pairs-data", data)
    )


def _values(
    recipe: RecipeResult, reference: list[Path], quantized: list[Path], progress: Progress
) -> dict[str, Sequence[float]]:
    """Values to sort a recipe's pairs by: their difference, and each metric with a value for each image."""
    kept = {name: recipe.metrics[name].values for name in METRICS if name in recipe.metrics}
    apart = []
    for pair in zip(reference, quantized, strict=True):
        apart.append(rms_difference(*open_alike(list(pair))))
        progress("comparing pairs", len(apart), len(reference))
    return {DIFFERENCE: apart, **{name: values for name, values in kept.items() if values}}


def _shown(differences: list[Sequence[float]], most: int) -> list[int]:
    """The pairs that are shown, at most so many, in the order of their numbers."""
    largest = [max(apart) for apart in zip(*differences, strict=True)]
    ranked = sorted(range(len(largest)), key=largest.__getitem__, reverse=True)
    return sorted(ranked[:most])


def _sort(name: str) -> dict[str, Any]:
    """Title, unit, number format and direction of what pairs are sorted by, for the page's script."""
    if name == DIFFERENCE:
        return {"title": "Difference", "worse": "higher", "unit": " of 255", "decimals": 1}
    kind = METRICS[name]
    digits = int("".join(filter(str.isdigit, kind.digits)))
    return {
        "title": kind.title,
        "worse": "lower" if kind.better == "higher" else "higher",
        "unit": kind.unit,
        ("decimals" if kind.digits.endswith("f") else "digits"): digits,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _about(shown: int, count: int, encoding: WebP | None, frames: int) -> str:
    which = "" if shown == count else f"The {shown:,} of {count:,} pairs with the largest difference. "
    how = "The images are the files themselves." if encoding is None else f"The images are re-encoded here ({encoding})"
    files = "" if encoding is None else "; the files that were scored are linked."
    if frames > 1:
        files = (
            f"; {frames} frames of every video stand side by side, and the files that were scored are linked and play."
        )
    return (
        f"{which}The images of a prompt share its seed and initial noise. Drag or use the arrow keys to compare; click "
        f"or press Enter to enlarge. The difference is the root mean square over all pixels, of 255. {how}{files}"
    )


def _link(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def _size(path: Path) -> tuple[int, int]:
    width, height = image_size(path)
    return width * min(number_of_frames(path), STRIP), height


def _figure(
    index: int,
    prompt: str,
    size: tuple[int, int],
    files: dict[str, str],
    given: dict[str, str],
    sources: Sequence[str],
) -> str:
    """A pair, and what was `given` for it; `sources` are the images of both."""
    width, height = size
    layers = "\n".join(
        f'<a class="layer" data-name="{escape(name)}" href="{escape(file)}"><img alt="{escape(name)}" loading="lazy" '
        f'decoding="async" width="{width}" height="{height}" src="{source}"><span>{escape(name)}</span></a>'
        for (name, file), source in zip(files.items(), sources[: len(files)], strict=True)
    )
    inputs = "".join(
        f'<a href="{escape(file)}"><img alt="{escape(name)}" loading="lazy" decoding="async" src="{source}">'
        f"<span>{escape(name)}</span></a>"
        for (name, file), source in zip(given.items(), sources[len(files) :], strict=True)
    )
    inputs = f'<div class="inputs">{inputs}</div>\n' if inputs else ""
    return (
        f'<figure class="pair" data-number="{index}">\n<div class="frame" style="--width:{width};--height:{height}">\n'
        f'{layers}\n</div>\n{inputs}<figcaption><b>{index}</b> <span class="prompt" dir="auto">{escape(prompt)}</span> '
        '<span class="value"></span></figcaption>\n</figure>'
    )
