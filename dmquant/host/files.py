"""Files: written whole or not at all, so that an interrupted run never leaves half of one, and told apart by hash."""

import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dmquant.errors import UserError

SETTLED = 1_000_000_000  # nanoseconds: two changes of a file that is younger may have the same time
FILES_REMEMBERED = 1 << 18

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; it becomes `path` when the block succeeds and is removed when not.

    Makes the folder if needed. Raises UserError when the operating system refuses (full disk, no permission).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is not there, or a file is in the place of its folder
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of UTF-8 text, which is made if need be; UserError when the operating system refuses.

    A line that was written in part only, as on a full disk, spoils none after it.
    """
    try:
        with path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            torn = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def in_package(package: str, file: str) -> Path | None:
    """A file of an installed package, which is located and not imported; None where either is missing."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders if (path := Path(folder, file)).is_file()), None)


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hexadecimal, read as a stream; `on_bytes` is told of every piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def json_sha256(value: Any, separators: tuple[str, str] | None = None) -> str:
    """SHA-256, in hexadecimal, of what `json.dumps` makes of a value; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=separators).encode()).hexdigest()


def fingerprint(**settings: Any) -> str:
    """A short hash of settings that JSON can hold; equal settings in any order give equal hashes."""
    return json_sha256(settings, (",", ":"))[:32]


def remembering(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read` of a file, whose result this process keeps for as long as the file's size and time of change are the same.

    Raises UserError for a file that is missing or cannot be read.
    """

    @functools.lru_cache(FILES_REMEMBERED)
    def kept(path: Path, size: int, mtime_ns: int) -> T:
        return read(path)

    @functools.wraps(read)
    def read_once(path: Path) -> T:
        try:
            status = path.stat()
            if time.time_ns() - status.st_mtime_ns < SETTLED:
                return read(path)
            return kept(path, status.st_size, status.st_mtime_ns)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    return read_once
