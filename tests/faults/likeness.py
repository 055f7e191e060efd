"""Whether two run folders are the same: every file by its SHA-256, less what no two runs have in common."""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

UNLIKE = ("log.txt", ".lock")
"""Files that are not compared: the log has times of day, and a line more for every attempt; the lock has no content."""
MEASURED = re.compile(r"seconds(_\w+)?|peak_memory_bytes")
"""Keys of JSON, and columns of CSV: numbers above 0 there, or anywhere below, are not compared. A zero is."""
TEXTS = (
    (re.compile(r"\b(quantize|generate|score) [\d.,]+ (s|min|h)\b"), r"\1 TIME"),
    (re.compile(r"(?<=\| )[\d.,]+ (s|min|h)(?= \|)"), "TIME"),
    (re.compile(r"\b[\d.,]+ (MB|GB)\b"), "MEMORY"),
)
"""What is not compared in the text of Markdown and HTML: the time of a stage, and sizes as large as a process."""


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, as compared, by its path; empty folders count too."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_file() and path.name not in UNLIKE}
    whole = {name: path.read_bytes() for name, path in files.items()}
    compared = {name: _comparable(files[name], data) for name, data in whole.items()}
    hashes = {_hash(data): name for name, data in whole.items() if compared[name] != data}
    # The hash of a file with times, which another file may hold, stands for what is compared of that file.
    for digest, name in hashes.items():
        compared = {
            other: data.replace(digest.encode(), f"hash of {name}".encode()) for other, data in compared.items()
        }
    empty = {name: "an empty folder" for name, path in paths.items() if path.is_dir() and not any(path.iterdir())}
    return {name: _hash(data) for name, data in compared.items()} | empty


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for every file that is missing, left over, or another."""
    missing = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    left_over = [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return missing + left_over + [f"another: {name}" for name in both if expected[name] != found[name]]


def _comparable(path: Path, data: bytes) -> bytes:
    try:
        if path.suffix == ".json":
            value = json.loads(data)
            kept = _without_measurements(value)
            return data if kept == value else json.dumps(kept).encode()
        if path.suffix in (".md", ".html"):
            text = data.decode("utf-8")
            for pattern, replacement in TEXTS:
                text = pattern.sub(replacement, text)
            return text.encode()
        if path.name == "sweep.csv":
            return _csv_without_measurements(data.decode("utf-8")).encode()
    except ValueError:
        return data  # damaged: it is unlike any other
    return data


def _without_measurements(value: Any, below: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _without_measurements(one, below or bool(MEASURED.fullmatch(key))) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_measurements(one, below) for one in value]
    return "MEASURED" if below and isinstance(value, int | float) and value > 0 else value


def _csv_without_measurements(text: str) -> str:
    rows = list(csv.DictReader(text.splitlines()))
    return repr([{name: cell for name, cell in row.items() if not MEASURED.fullmatch(name)} for row in rows])


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
