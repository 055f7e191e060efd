"""Whether two run folders are the same: every file by its SHA-256, less what no two runs have in common.

Not compared are: the log, which has times of day and a line more for every attempt; seconds and peak memory, where they
are above 0; the time of an image over full precision's, known only where one process made both, and the plot with it;
hashes and sizes of files that hold such; the hash that a JSON file has of itself; times and order in the manifest of
our files. Of the manifest it counts which of the files that are there it knows as they are.
"""

import base64
import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

PLOT = "compare.png"
UNLIKE = ("log.txt", "lock", PLOT)
OF_PROCESSES = re.compile(r"sessions_\w+|relative_time")
"""Keys of JSON that are not compared."""
MEASURED = re.compile(r"seconds(_\w+)?|(quantize_)?peak_memory_bytes")
"""Keys of JSON, and columns of CSV: numbers above 0 there, or anywhere below, are not compared."""
TEXTS = (
    (re.compile(r"\b(quantize|generate|score) [\d.,]+ (s|min|h)\b"), r"\1 TIME"),
    (re.compile(r"(?<=\| )[\d.,]+ (s|min|h)(?= \|)"), "TIME"),
    (re.compile(r"\b[\d.,]+ (MB|GB)\b"), "MEMORY"),
    (re.compile(r"(\d+\.\d\d×)(?:</td>\s*<td[^>]*>|\s*\|)\s*(?:\d+\.\d\d×)?\s*"), r"\1 TIME"),  # behind the compression
)
"""What is not compared in the text of Markdown and HTML: the time of a stage, and sizes as large as a process."""
OF_ITSELF = ("sha256", "record_sha256")
ROUNDS = 4  # of files that hold hashes of files that hold hashes


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, as compared, by its path; empty folders count too."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    whole = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    plots = [base64.b64encode(data) for name, data in whole.items() if Path(name).name == PLOT]
    whole = {name: _without(data, plots) for name, data in whole.items() if Path(name).name not in UNLIKE}
    hashes = {name: _hash(data) for name, data in whole.items()}
    unlike: dict[str, str] = {}
    for _ in range(ROUNDS):
        compared = {name: _comparable(name, data, hashes, unlike) for name, data in whole.items()}
        unlike = {hashes[name]: f"hash of {name}" for name, data in whole.items() if compared[name] != data}
    empty = {name: "an empty folder" for name, path in paths.items() if path.is_dir() and not any(path.iterdir())}
    return {name: _hash(data) for name, data in compared.items()} | empty


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for every file that is missing, left over, or another."""
    missing = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    left_over = [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return missing + left_over + [f"another: {name}" for name in both if expected[name] != found[name]]


def _without(data: bytes, plots: list[bytes]) -> bytes:
    """The bytes of a file without the plots that a page holds."""
    for plot in plots:
        data = data.replace(plot, b"PLOT")
    return data


def _comparable(name: str, data: bytes, hashes: dict[str, str], unlike: dict[str, str]) -> bytes:
    """The bytes of a file less what is not compared; `unlike` has a word for the hash of each file that is so."""
    path = Path(name)
    try:
        if path.name == "manifest.jsonl":
            return _known_as_they_are(path.parent.parent, data, hashes)
        if path.suffix == ".json":
            value = json.loads(data)
            kept = _without_measurements(value, unlike)
            if isinstance(kept, dict):
                kept = {key: one for key, one in kept.items() if key not in OF_ITSELF}
            return data if kept == value else json.dumps(kept, sort_keys=True).encode()
        if path.suffix in (".md", ".html"):
            text = data.decode("utf-8")
            for pattern, replacement in TEXTS:
                text = pattern.sub(replacement, text)
            return text.encode()
        if path.name == "sweep.csv":
            rows = csv.DictReader(data.decode("utf-8").splitlines())
            return repr(
                [{key: cell for key, cell in row.items() if not MEASURED.fullmatch(key)} for row in rows]
            ).encode()
    except ValueError:
        return data  # damaged: it is unlike any other
    return data


def _without_measurements(value: Any, unlike: dict[str, str], below: bool = False) -> Any:
    if isinstance(value, dict):
        kept = {} if str(value.get("sha256")) not in unlike else {"size": "that of the file"}
        return {
            key: _without_measurements(one, unlike, below or bool(MEASURED.fullmatch(key)))
            for key, one in value.items()
            if not OF_PROCESSES.fullmatch(key)
        } | kept
    if isinstance(value, list):
        return [_without_measurements(one, unlike, below) for one in value]
    if isinstance(value, str):
        return unlike.get(value, value)
    return "measured" if below and isinstance(value, int | float) and value > 0 else value


def _known_as_they_are(root: Path, data: bytes, hashes: dict[str, str]) -> bytes:
    known = set()
    for line in data.decode("utf-8").splitlines():
        name, *record = json.loads(line)
        if not record or hashes.get((root / name).as_posix()) == record[-1]:
            known.add(name)
    return "\n".join(sorted(known)).encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
