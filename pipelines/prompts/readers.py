"""Prompts in the files they come in: text, CSV, TSV, JSON, JSON lines, Parquet, COCO captions, HPSv2's benchmark."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmquant.errors import UsageError, UserError, unknown

STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of HPSv2's benchmark, each with prompts of its own."""
NO_STYLE = ""
USUAL_COLUMNS = frozenset({"prompt", "prompts", "prompt_en", "caption", "captions", "text"})
MISSING = frozenset({"", "nan", "NaN"})
"""Cells that hold no prompt; the two words are what pandas writes for an empty cell."""
SHOWN_COLUMNS = 20

Found = list[str] | dict[str, list[str]]


def read_file(path: Path, column: str | None = None) -> dict[str, list[str]]:
    """The prompts of a file or folder by style, all under NO_STYLE where it has no styles; in the file's order.

    White space around a prompt is dropped, and so are prompts without any text.

    Raises UsageError for a column that is not there and where none, or more than one, is called as usual; UserError
    for a file that cannot be read or holds something else.
    """
    read = _benchmark if path.is_dir() else _READERS.get(path.suffix.lower(), _lines)
    found = read(path, column)
    return found if isinstance(found, dict) else {NO_STYLE: found}


def text_lines(text: str) -> list[str]:
    """The prompts of a text, one for each line; blank lines and lines that start with `#` are left out."""
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _lines(path: Path, column: str | None) -> Found:
    _refuse_column(path, column)
    return text_lines(_text_of(path))


def _delimited(path: Path, column: str | None, delimiter: str) -> Found:
    (_, header), *rows = _rows(path, delimiter) or [(0, [])]
    names = [name.strip() for name in header]
    for line, row in rows:
        if any(cell.strip() for cell in row[len(names) :]):
            raise UserError(
                f"{path}, line {line}: {len(row)} values for {len(names)} columns; put prompts that hold "
                f"{'a tab' if delimiter == chr(9) else 'commas'} into double quotes"
            )
    name = _choose(path, names, column)
    index = names.index(name)
    return _column(path, name, [row[index] if index < len(row) else None for _, row in rows])


def _rows(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line."""
    text = _text_of(path)
    # Many TSV files know no quoting: there a prompt may begin with a quotation mark.
    quotings = [csv.QUOTE_MINIMAL] if delimiter == "," else [csv.QUOTE_MINIMAL, csv.QUOTE_NONE]
    for quoting in quotings:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            return [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            problem = f"{path}, line {reader.line_num}: {error}"
    raise UserError(problem)


def _json(path: Path, column: str | None) -> Found:
    data = _parse(_text_of(path), str(path))
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
    name = _choose(path, list(data), column)
    cells = data[name]
    if isinstance(cells, dict):  # as pandas writes a column: by the rows' names
        cells = list(cells.values())
    if not isinstance(cells, list):
        raise UserError(f"'{name}' in {path} holds {_kind(cells)}, not a list of prompts")
    return _column(path, name, cells)


def _json_lines(path: Path, column: str | None) -> Found:
    lines = enumerate(_text_of(path).split("\n"), start=1)
    return _records(path, [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()], column)


def _parquet(path: Path, column: str | None) -> Found:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            name = _choose(path, file.schema_arrow.names, column)
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
    return {style: _records(file, _parse(_text_of(file), str(file)), None) for style, file in files.items()}


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
        raise UserError(f"{path} holds {_kind(items)} where a list of prompts should be")
    if items and all(isinstance(item, dict) for item in items):
        name = _choose(path, list(dict.fromkeys(name for item in items for name in item)), column)
        return _column(path, name, [item.get(name) for item in items])
    _refuse_column(path, column)
    return _texts(items, str(path))


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
    texts = _texts(cells, where)
    if texts and all(map(_is_number, texts)):
        raise UserError(f"{where} holds numbers, not prompts; numbers of classes go into a .txt, one a line")
    return texts


def _texts(cells: Iterable[Any], where: str) -> list[str]:
    texts = []
    for cell in cells:
        if cell is None or cell != cell:  # NaN
            continue
        if not isinstance(cell, str):
            raise UserError(f"{where} holds {_kind(cell)}, not text")
        if (text := cell.strip()) not in MISSING:
            texts.append(text)
    return texts


def _kind(value: Any) -> str:
    if isinstance(value, int | float):
        return "numbers"
    return {list: "lists", dict: "objects", str: "text", bytes: "bytes"}.get(type(value), type(value).__name__)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_column(path: Path, column: str | None) -> None:
    if column is not None:
        raise UsageError(f"{path} has no columns to choose from: leave ':{column}' away")


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON: {error}") from None


_READERS: dict[str, Callable[[Path, str | None], Found]] = {
    ".txt": _lines,
    ".csv": partial(_delimited, delimiter=","),
    ".tsv": partial(_delimited, delimiter="\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
SUFFIXES = frozenset(_READERS)
"""File names that end so are of a known kind; any other file is read as text with one prompt a line."""
