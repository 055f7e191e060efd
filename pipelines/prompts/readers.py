"""Prompts in the files they come in: text, CSV, TSV, JSON, YAML, Parquet, COCO captions, HPSv2's benchmark."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dmquant.errors import UsageError, UserError, unknown
from dmquant.pipelines.prompts.structured import parse_json, parse_yaml
from dmquant.pipelines.prompts.texts import (
    BLANK,
    MISSING,
    MOST_PROMPTS,
    check_lines,
    kind_of,
    lines_of,
    prompts_of,
    reading,
    whole_text,
)

STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of HPSv2's benchmark, each with prompts of its own."""
NO_STYLE = ""
USUAL_COLUMNS = frozenset({"prompt", "prompts", "prompt_en", "caption", "captions", "text"})
SHOWN_COLUMNS = 20
YAML_BYTES = 10_000_000  # it is read at some 5 MB a second
LONGEST_OBJECT = 1_000_000  # characters of a line of JSON
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "a tab"}
COMMENT, NO_COMMENT = "#", "\\#"

PICTURED = "prompt"  # the column that images may stand beside
PICTURES = ("image", "mask", "control")
"""Columns of a CSV or TSV file whose cells are files of images, relative to the file."""


@dataclass(frozen=True)
class Listed:
    """The prompts of a file by style, all under NO_STYLE where it has none; how many of its lines were comments; and by
    column of PICTURES the file of an image for each prompt."""

    by_style: dict[str, list[str]]
    comments: int = 0
    pictures: dict[str, list[Path]] = field(default_factory=dict)


Found = list[str] | dict[str, list[str]] | Listed


def read_file(path: Path, column: str | None = None) -> Listed:
    """The prompts of a file or folder, in the file's order.

    White space around a prompt is dropped, and so are prompts without any text.

    Raises UsageError for a column that is not there and where none, or more than one, is called as usual; UserError
    for a file that cannot be read or holds something else, and for one beyond the bounds of `texts`.
    """
    if path.is_dir():
        return Listed(_benchmark(path, column))
    if not path.is_file():
        raise UserError(f"{path} is a device or a pipe, no file: write the prompts to a file")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        return _lines(path, column)
    found = read(path, column)
    if isinstance(found, Listed):
        return found
    return Listed(found if isinstance(found, dict) else {NO_STYLE: found})


def text_lines(text: str) -> list[str]:
    """The prompts of a text, one for each line; blank lines and comments, which start with `#`, are left out."""
    return [prompt for line in text.split("\n") if (prompt := _uncommented(line.strip()))]


def _lines(path: Path, column: str | None) -> Listed:
    _refuse_column(path, column)
    comments = 0

    def prompts() -> Iterator[str | None]:
        nonlocal comments
        for _, line in lines_of(path):
            comments += line.strip().startswith(COMMENT)
            yield _uncommented(line.strip())

    return Listed({NO_STYLE: prompts_of(prompts(), str(path), BLANK)}, comments)


def _uncommented(line: str) -> str | None:
    """The prompt on a line; None for a comment. A prompt that begins with `#` is written behind a backslash."""
    if line.startswith(COMMENT):
        return None
    return line[1:] if line.startswith(NO_COMMENT) else line


def _delimited(path: Path, column: str | None, delimiter: str) -> Found:
    check_lines(path)
    # Many TSV files know no quoting: there a prompt may begin with a quotation mark.
    quotings = [csv.QUOTE_MINIMAL] if delimiter == "," else [csv.QUOTE_MINIMAL, csv.QUOTE_NONE]
    for quoting in quotings:
        with reading(path, newline="") as file:
            first = file.readline()
            file.seek(0)
            usual = ";" if delimiter == "," and ";" in first and "," not in first else delimiter
            reader = csv.reader(file, delimiter=usual, quoting=quoting, strict=True)
            try:
                return _cells(path, column, reader, usual)
            except csv.Error as error:
                problem = f"{path}, line {reader.line_num}: {error}"
    raise UserError(problem)


def _cells(path: Path, column: str | None, reader: Any, delimiter: str) -> Listed:
    """One column of a table whose first row names the columns; rows without any cell are left out.

    Where that is PICTURED and was not asked for by name, the columns of PICTURES go with it.
    """
    rows = (row for row in reader if row)
    names = [name.strip() for name in next(rows, [])]
    name = _choose(path, names, column)
    index = names.index(name)
    beside = [kind for kind in PICTURES if kind in names] if column is None and name == PICTURED else []
    pictures: dict[str, list[Path]] = {kind: [] for kind in beside}

    def cells() -> Iterator[str | None]:
        for row in rows:
            if any(cell.strip() for cell in row[len(names) :]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} values for {len(names)} columns; put prompts that "
                    f"hold {DELIMITERS[delimiter]} into double quotes"
                )
            cell = row[index].strip() if index < len(row) else ""
            if cell in MISSING:
                yield None
                continue
            for kind in beside:
                file = "".join(row[names.index(kind) :][:1]).strip()
                if not file:
                    raise UsageError(f"{path}, line {reader.line_num}: nothing in column '{kind}': name a file there")
                pictures[kind].append(path.parent / file)
            yield cell

    return Listed({NO_STYLE: _column(path, name, cells())}, pictures=pictures)


def _json(path: Path, column: str | None) -> Found:
    return _structured(path, parse_json(whole_text(path), str(path)), column)


def _yaml(path: Path, column: str | None) -> Found:
    return _structured(path, parse_yaml(whole_text(path, YAML_BYTES), str(path)), column)


def _structured(path: Path, data: Any, column: str | None) -> Found:
    """The prompts in the content of a JSON or YAML file."""
    if isinstance(data, list):
        return _records(path, data, column)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds neither a list nor an object, so no prompts")
    if isinstance(data.get("annotations"), list):
        _refuse_column(path, column)
        return _coco(path, data["annotations"])
    if data and data.keys() <= set(STYLES):
        _refuse_column(path, column)
        return {style: _records(path, data[style], None) for style in STYLES if style in data}
    is_column = column in data if column is not None else bool(_usual(data))
    if not is_column and all(isinstance(value, dict) for value in data.values()):
        return _records(path, list(data.values()), column)  # rows by name
    if not is_column and column is None and all(isinstance(value, str) for value in data.values()):
        return prompts_of(data.values(), str(path))  # prompts by id
    name = _choose(path, list(data), column)
    cells = data[name]
    if isinstance(cells, dict):  # as pandas writes a column: by the rows' names
        cells = list(cells.values())
    if not isinstance(cells, list):
        raise UserError(f"'{name}' in {path} holds {kind_of(cells)}, not a list of prompts")
    return _column(path, name, cells)


def _json_lines(path: Path, column: str | None) -> Found:
    lines = lines_of(path, most=LONGEST_OBJECT)
    return _records(
        path, [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()], column
    )


def _parquet(path: Path, column: str | None) -> Found:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            name = _choose(path, file.schema_arrow.names, column)
            if file.metadata.num_rows > MOST_PROMPTS:
                raise UserError(f"{path} has more than {MOST_PROMPTS:,} rows: keep the prompts that are meant")
            cells = file.read([name]).column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
    return _column(path, name, cells)


def _benchmark(folder: Path, column: str | None) -> Found:
    """HPSv2's benchmark as its package downloads it: a folder with one list a style."""
    _refuse_column(folder, column)
    files = {style: folder / f"{style}.json" for style in STYLES}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is not the folder of HPSv2's benchmark, whose prompts are in {', '.join(missing)}")
    return {style: _records(file, parse_json(whole_text(file), str(file)), None) for style, file in files.items()}


def _coco(path: Path, annotations: Sequence[Any]) -> list[str]:
    """The captions of COCO: for each image the one with the lowest id, in the order of the images' ids."""
    first: dict[Any, str] = {}
    try:
        for each in sorted(annotations, key=lambda each: (each["image_id"], each["id"])):
            if caption := each["caption"].strip():
                first.setdefault(each["image_id"], caption)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} has annotations, but not captions, each with image_id, id and caption; COCO's are in files "
            "such as captions_val2014.json"
        ) from None
    return list(first.values())


def _records(path: Path, items: Any, column: str | None) -> list[str]:
    """The prompts in a list of strings, or in one column of a list of objects."""
    if not isinstance(items, list):
        raise UserError(f"{path} holds {kind_of(items)} where a list of prompts should be")
    if items and all(isinstance(item, dict) for item in items):
        name = _choose(path, list(dict.fromkeys(name for item in items for name in item)), column)
        return _column(path, name, [item.get(name) for item in items])
    _refuse_column(path, column)
    return prompts_of(items, str(path))


def _choose(path: Path, names: Sequence[str], column: str | None) -> str:
    """The column to read: the one asked for, else the only one with a usual name."""
    listed = ", ".join(names[:SHOWN_COLUMNS]) + (", ..." if len(names) > SHOWN_COLUMNS else "")
    if column is not None:
        if column not in names:
            raise unknown(f"column of {path}", column, names, f"it has {listed or 'none'}")
        return column
    usual = _usual(names)
    if len(usual) == 1:
        return usual[0]
    if not names:
        raise UserError(f"{path} holds no prompts")
    example = f"{path.name}:{(usual or list(names))[0]}"
    which = "more than one column that may be the prompts" if usual else "no column called prompt, caption or text"
    raise UsageError(f"{path} has {which}, but {listed}: say which one, as in {example}")


def _usual(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower() in USUAL_COLUMNS]


def _column(path: Path, name: str, cells: Iterable[Any]) -> list[str]:
    where = f"column '{name}' of {path}"
    texts = prompts_of(cells, where)
    if texts and all(map(_is_number, texts)):
        raise UserError(f"{where} holds numbers, not prompts; numbers of classes go into a .txt, one a line")
    return texts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_column(path: Path, column: str | None) -> None:
    if column is not None:
        raise UsageError(f"{path} has no columns to choose from: leave ':{column}' away")


_READERS: dict[str, Callable[[Path, str | None], Found]] = {
    ".csv": partial(_delimited, delimiter=","),
    ".tsv": partial(_delimited, delimiter="\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".parquet": _parquet,
}
SUFFIXES = frozenset({".txt", *_READERS})
"""File names that end so are of a known kind; any other file is read as text with one prompt a line."""
