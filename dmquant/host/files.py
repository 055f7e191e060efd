"""Files: written whole or not at all, so that an interrupted run never leaves half of one, and told apart by hash."""

import functools
import glob
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dmquant.errors import UserError

SETTLED = 1_000_000_000  # nanoseconds: two changes of a file that is younger may have the same time
FILES_REMEMBERED = 1 << 18
SEAL = "sha256"

T = TypeVar("T")


class Keeper(Protocol):
    """A folder that keeps account of the files that are written below it (`dmquant.host.owned`)."""

    def depth(self, path: Path) -> int:
        """Length of the root that `path` is below; 0 where it is not."""

    def temporary(self, path: Path) -> Path | None:
        """Where to write a file that is to become `path`; None for beside it."""

    def admit(self, path: Path, temporary: Path) -> None:
        """Take note of a finished file that is about to become `path`."""


keepers: list[Keeper] = []


def keeper_of(path: Path) -> Keeper | None:
    """The keeper of the innermost folder that `path` is below, of those that are open; None where none is."""
    return max((one for one in keepers if one.depth(path)), key=lambda one: one.depth(path), default=None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name; it becomes `path` when the block succeeds and is removed when not.

    Makes the folder if needed. Raises UserError when the operating system refuses (full disk, no permission).
    """
    keeper, temporary = keeper_of(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = (keeper and keeper.temporary(path)) or _beside(path)
        yield temporary
        as_umask_says(temporary)
        if keeper is not None:
            keeper.admit(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # it is not there, or a file is in the place of its folder
                temporary.unlink()


def as_umask_says(path: Path) -> None:
    """Give a file, or every file below a folder, the mode of a new file: safetensors writes for the owner alone."""
    mask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != 0o666 & ~mask:
            file.chmod(0o666 & ~mask)


def _beside(path: Path) -> Path:
    """A name beside `path` that no other process writes to; what killed processes left under such names is removed."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.dmquant{glob.escape(path.suffix)}"):
        number = left.name.removesuffix(path.suffix).removesuffix(".dmquant").rpartition(".")[2]
        if number.isdecimal() and not _is_alive(int(number)):
            left.unlink(missing_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}.dmquant{path.suffix}")


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where a signal of 0 ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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


def sealed_json(content: dict[str, Any]) -> dict[str, Any]:
    """An object with the SHA-256 of all else in it, under `sha256`."""
    return content | {SEAL: json_sha256(content)}


def take_seal(content: dict[str, Any]) -> bool | None:
    """Take out of an object what `sealed_json` put into it; whether the rest is as it was, None where there is none."""
    return content.pop(SEAL) == json_sha256(content) if SEAL in content else None


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
