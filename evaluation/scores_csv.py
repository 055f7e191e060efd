"""`scores.csv`: one row an image, so that the images behind a mean can be looked up, sorted and plotted elsewhere.

Columns are `image` (the file name), `prompt`, and one a metric, under its name in report.json. Numbers have all their
digits, so that they read back equal. A text that a spreadsheet would compute stands behind an apostrophe, and control
characters are escapes; `read_scores` gives the text as it was.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmquant.host.files import replacing
from dmquant.host.text import escaped, unescaped

IMAGE, PROMPT = "image", "prompt"
_FORMULA = re.compile(r"(?:^|(?<=[;\t\n]))(?='*[ ]*[=+\-@\t\uff0b\uff0d\uff1d\uff20])")
"""The place before what a spreadsheet computes: a cell begins there, where a semicolon or tab separates cells, too."""
_QUOTED = re.compile(r"(?:^|(?<=[;\t\n]))'(?='*[ ]*[=+\-@\t\uff0b\uff0d\uff1d\uff20])")


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
    rows = zip(
        map(text_cell, names),
        map(text_cell, prompts),
        *(map(repr, map(float, column)) for column in merged.values()),
        strict=True,
    )
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
    return Scores(list(map(_text, names)), list(map(_text, prompts)), metrics)


def text_cell(text: str) -> str:
    """`text` as a cell that no spreadsheet computes and no terminal acts on."""
    return _FORMULA.sub("'", escaped(text))


def _text(cell: str) -> str:
    """The inverse of `text_cell`."""
    return unescaped(_QUOTED.sub("", cell))
