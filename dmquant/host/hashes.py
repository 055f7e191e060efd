"""SHA-256 of files that are hashed often: while a file stays the same it is read once, by whichever command came first.

A file is the same while its path, size, time of change and inode are. Hashes of large files are kept in
`hashes.json` of the folder of caches (`dmquant.host.caches`).
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from dmquant.errors import UserError
from dmquant.host import caches
from dmquant.host.files import sha256, write_text

LARGE = 1 << 20  # bytes from which on reading a file takes longer than looking it up
SETTLED = 2.0  # seconds after which a further change of a file shows in its time of change on any file system
MOST = 4096  # files that are remembered

_in_this_process: dict[tuple[int, ...], str] = {}


def sha256_once(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """`dmquant.host.files.sha256`, without reading a file that was read before and has not changed since."""
    stat, place = path.stat(), str(path.resolve())
    identity = _identity(stat)
    digest = _in_this_process.get(identity) or _remembered(place, stat)
    if digest is not None:
        on_bytes(stat.st_size)
    else:
        digest = sha256(path, on_bytes)
        if _identity(path.stat()) != identity or time.time() - stat.st_mtime < SETTLED:
            return digest  # it may change again without showing it
        if stat.st_size >= LARGE:
            _remember(place, stat, digest)
    _in_this_process[identity] = digest
    return digest


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    """A file's identity: equal for two names of one file, different for two states of it."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _file() -> Path | None:
    folder = caches.folder()
    return folder and folder / "hashes.json"


def _remembered(place: str, stat: os.stat_result) -> str | None:
    if stat.st_size < LARGE:
        return None
    match caches.known(_file()).get(place):
        case [stat.st_size, stat.st_mtime_ns, stat.st_ino, str(digest)]:
            return digest
    return None


def _remember(place: str, stat: os.stat_result, digest: str) -> None:
    """Add to the file; where that cannot be, the next command hashes again."""
    known = caches.known(_file())
    known.pop(place, None)
    known[place] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, digest]
    if file := _file():
        with contextlib.suppress(UserError):
            write_text(file, json.dumps(dict(list(known.items())[-MOST:])))
