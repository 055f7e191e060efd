"""The points at which a process changes files below one folder, counted; a fault strikes at one of them.

A point is an open-for-write, a rename, a removal, a new folder, a link, or a file that safetensors writes. The
functions of Python that do these things, and safetensors' own, are replaced by ones that count.
"""

import builtins
import errno
import functools
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

MAKES = ("mkdir", "link", "symlink")
CHANGES = (*MAKES, "replace", "rename", "unlink", "remove", "rmdir", "truncate")
BEFORE, AFTER, WITHIN, FULL = "before", "after", "within", "full"
WRITES = frozenset("wax+")
SAFETENSORS_TEMPORARY = ".tmpFAULTS"  # safetensors writes under such a name, then renames


@dataclass
class Points:
    """Callable in a process before its command: strike at point `at` of the changes below `folder`, or list all.

    `when` is `before`, `after` or `within` (half of the first piece is written) for a SIGKILL, and `full` for a disk
    that is full from this point on. With `listed`, each point is added to that file as a line.
    """

    folder: Path
    at: int | None = None
    when: str = BEFORE
    listed: Path | None = None
    count: int = field(default=0, init=False)
    is_full: bool = field(default=False, init=False)

    def __call__(self) -> None:
        self.folder = self.folder.resolve()
        self._open, self._serialize = io.open, safetensors.torch.serialize_file
        builtins.open = io.open = self._opening
        safetensors.torch.serialize_file = self._serializing
        os.open = self._around("open", os.open, _writes)
        for name in CHANGES:
            setattr(os, name, self._around(name, getattr(os, name), _changes))

    def _is_below(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        return Path(os.path.abspath(path)).is_relative_to(self.folder)

    def _reached(self, what: str, path: Any) -> str | None:
        """Count a point; the moment at which to strike there, if it is the one."""
        if self.listed is not None:
            with self._open(self.listed, "a", encoding="utf-8") as lines:
                lines.write(f"{what} {os.path.relpath(os.path.abspath(path), self.folder)}\n")
        self.count += 1
        struck = self.when if self.count - 1 == self.at else None
        self.is_full = self.is_full or struck == FULL
        if struck == BEFORE:
            _die()
        return struck

    def _around(self, name: str, function: Callable, counts: Callable) -> Callable:
        @functools.wraps(function)
        def changing(path: Any, *args: Any, **options: Any) -> Any:
            relative = options.get("dir_fd") is not None  # as rmtree removes; below a folder that was given whole
            if not (relative or self._is_below(path)) or not counts(name, path, *args, **options):
                return function(path, *args, **options)
            struck = self._reached(name, path)
            if self.is_full and name in MAKES:
                raise _no_space()
            result = function(path, *args, **options)
            if struck in (AFTER, WITHIN):
                _die()
            return result

        return changing

    def _opening(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not (WRITES & set(mode)) or not self._is_below(file):
            return self._open(file, mode, *args, **options)
        struck = self._reached("open", file)
        opened = self._open(file, mode, *args, **options)
        if struck == AFTER:
            _die()
        return _Written(opened, struck == WITHIN, self)

    def _serializing(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        if not self._is_below(filename):
            return self._serialize(tensors, filename, metadata=metadata)
        struck = self._reached("safetensors", filename)
        if self.is_full:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
        self._serialize(tensors, filename, metadata=metadata)
        if struck == WITHIN:
            whole = Path(filename)
            data = whole.read_bytes()
            whole.with_name(SAFETENSORS_TEMPORARY).write_bytes(data[: len(data) // 2])
            whole.unlink()
        if struck in (WITHIN, AFTER):
            _die()
        return None


class _Written:
    """A file that is written: whole, or half of the first piece and then the process dies, or not on a full disk."""

    def __init__(self, file: Any, torn: bool, points: Points):
        self._file, self._torn, self._points = file, torn, points

    def write(self, data: Any) -> int:
        if self._points.is_full:
            raise _no_space()
        if self._torn:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            _die()
        return self._file.write(data)

    def writelines(self, pieces: Any) -> None:
        for piece in pieces:
            self.write(piece)

    def __enter__(self) -> "_Written":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _writes(name: str, path: Any, flags: int, *_: Any, **__: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


def _changes(name: str, path: Any, *_: Any, **options: Any) -> bool:
    """Whether there is something to change: no folder that is there is made, and no file that is missing removed."""
    return (
        options.get("dir_fd") is not None or name in ("link", "symlink") or os.path.lexists(path) != (name == "mkdir")
    )


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
