"""`scores.csv`: one row an image, so that the images behind a mean can be looked up, sorted and plotted elsewhere.

Columns are `image` (the file name), `prompt`, and one a metric, under its name in report.json. Numbers have all their
digits, so that they read back equal.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmquant.host.files import replacing

IMAGE, PROMPT = "image", "prompt"


@dataclass(frozen=True)
class Scores:
    """The content of a scores.csv: file names, prompts, and under the name of each metric a value for each image."""

    names: list[str]
    prompts: list[str]
    columns: dict[str, list[float]]


def write_scores(
    path: Path, names: Sequence[str], prompts: Sequence[str], columns: Mapping[str, Sequence[float]]
) -> None:
    """Write the scores of images, whole or not at all.

    Columns already in the file stay beside the new ones, or are replaced by those of the same name, as long as the file
    is about the same images with the same prompts. Raises ValueError for columns of another length than the names.
    """
    old = read_scores(path)
    kept = old.columns if old and (old.names, old.prompts) == (list(names), list(prompts)) else {}
    merged = {**kept, **columns}
    rows = zip(names, prompts, *(map(repr, map(float, column)) for column in merged.values()), strict=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(IMAGE, PROMPT, *merged), *rows])


def read_scores(path: Path) -> Scores | None:
    """The scores in the file at `path`; None when there is none or it is damaged."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return _parse(csv.reader(file, strict=True))
    except (OSError, ValueError, csv.Error):
        return None


def columns(path: Path, names: Sequence[str]) -> dict[str, list[float]] | None:
    """The metrics in the file by name, one value an image; None unless it is about exactly the images `names`."""
    scores = read_scores(path)
    return scores.columns if scores and scores.names == list(names) else None


def _parse(lines: Iterable[list[str]]) -> Scores:
    """Raises ValueError for what `write_scores` cannot have written."""
    header, *rows = lines
    if header[:2] != [IMAGE, PROMPT]:
        raise ValueError("not a table of scores")
    names, prompts, *values = ([] for _ in header) if not rows else map(list, zip(*rows, strict=True))
    metrics = dict(zip(header[2:], ([float(value) for value in column] for column in values), strict=True))
    return Scores(names, prompts, metrics)
