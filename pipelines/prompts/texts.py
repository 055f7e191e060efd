"""Text in files of prompts, within bounds that no list of prompts comes near: what is beyond is refused at once."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dmquant.errors import UserError

MOST_PROMPTS = 1_000_000
LONGEST = 20_000  # characters of a prompt: some ten times what any text encoder reads
MOST_BYTES = 200_000_000  # of a file that has to be read as a whole; COCO's largest has 92 MB
MOST_OF_LINES = 2_000_000_000  # bytes of a file that is read line by line
BLOCK = 1 << 20
BLANK = frozenset({""})
MISSING = BLANK | {"nan", "NaN"}
"""Cells that hold no prompt; the two words are what pandas writes for an empty cell."""


@contextlib.contextmanager
def reading(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file as UTF-8 text; what goes wrong in reading it is a UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error.reason}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def whole_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file that is read as a whole; UserError for one of more than `most` bytes."""
    with reading(path) as file:
        if path.stat().st_size > most:
            raise UserError(
                f"{path} has more than {most // 1_000_000} MB: keep the prompts alone, or use .txt or .jsonl"
            )
        return file.read()


def check_lines(path: Path) -> None:
    """UserError for a file that has more lines than there may be prompts, which are counted without being kept."""
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(BLOCK), b"") if path.stat().st_size <= MOST_OF_LINES else (b"\n" * BLOCK,)
            count = sum(block.count(b"\n") for block in blocks)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if count > MOST_PROMPTS:
        raise UserError(f"{path} has more than {MOST_PROMPTS:,} lines: keep the prompts that are meant")


def lines_of(path: Path, most: int = LONGEST) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, one after another; UserError for one of more than `most` characters."""
    check_lines(path)
    with reading(path) as file:
        lines = enumerate(iter(lambda: file.readline(most + 1), ""), start=1)
        for number, line in lines:
            if len(line) > most:
                raise UserError(f"{path}, line {number}: {_too_long(most)}")
            yield number, line


def prompts_of(cells: Iterable[Any], where: str, missing: frozenset[str] = MISSING) -> list[str]:
    """The prompts in cells: without white space around them, and without those that are `missing`.

    Raises UserError for what is no text, for a prompt that is too long or not Unicode, and for too many of them.
    """
    texts: list[str] = []
    for number, cell in enumerate(cells, start=1):
        if cell is None or cell != cell:  # NaN
            continue
        if not isinstance(cell, str):
            raise UserError(f"{where} holds {kind_of(cell)}, not text")
        if (text := cell.strip()) in missing:
            continue
        if problem := _problem(text):
            raise UserError(f"{where}, prompt {number}: {problem}")
        if len(texts) == MOST_PROMPTS:
            raise UserError(f"{where} holds more than {MOST_PROMPTS:,} prompts: keep those that are meant")
        texts.append(text)
    return texts


def kind_of(value: Any) -> str:
    """What a value of JSON, YAML or Parquet is, in the plural."""
    if isinstance(value, int | float):
        return "numbers"
    return {list: "lists", dict: "objects", str: "text", bytes: "bytes"}.get(type(value), type(value).__name__)


def _problem(text: str) -> str | None:
    if len(text) > LONGEST:
        return _too_long(LONGEST)
    if "\0" in text:
        return "it holds a NUL character: remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "it holds half a character (a lone surrogate): write the whole one"
    return None


def _too_long(most: int) -> str:
    return f"more than {most:,} characters, which no text encoder reads: shorten it"
