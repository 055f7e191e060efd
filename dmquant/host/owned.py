"""The files that dmquant wrote in a folder: the only module that removes any, or clears a place for a new one.

A folder that a command writes to holds a hidden room, `.dmquant`, with the lock of its writer, files that are being
written, and the manifest: a line of path, size, time of change and SHA-256 for each file, added before the file takes
its place. A file is ours for as long as it has a hash of its lines there. What is ours can be removed and replaced;
anything else is left alone, and moved aside where a file of ours has to be in its place.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dmquant.errors import UserError
from dmquant.host import files
from dmquant.host.files import append_line, sha256
from dmquant.host.room import LOCK, MANIFEST, MARKER, ROOM, UNFINISHED, furnish, is_room, lock_alone

KEPT = 2  # lines of a file that count: a command that was killed may have added one for a file that it never placed
ASIDE = ".replaced"


class Record(NamedTuple):
    """A file as it was written; its size and time of change, in nanoseconds, spare reading it again."""

    size: int
    mtime_ns: int
    sha256: str


class Owned:
    """The files of ours below `root`. Paths given to its methods are below it; the manifest has them in POSIX form."""

    def __init__(self, root: Path, room: Path | None = None):
        self.root, self.room = root, room or root / ROOM
        self._roots = tuple({os.path.abspath(root), os.path.realpath(root)})
        self._known: dict[str, list[Record]] = {}
        self._new: set[str] = set()
        """Names of files that this process wrote, whose size and time are enough to know them by."""
        self._inner: set[str] = set()
        """Folders below that are held as folders of this one, such as those of the recipes of a comparison."""
        self._written = 0
        self._read()

    @property
    def has_notes(self) -> bool:
        """Whether any file is known to be ours."""
        return bool(self._known)

    def depth(self, path: Path) -> int:
        """Length of the root that `path` is below, so that of several the innermost is found; 0 where it is not."""
        absolute = os.path.abspath(path)
        return max((len(root) for root in self._roots if absolute.startswith(root + os.sep)), default=0)

    def temporary(self, path: Path) -> Path | None:
        """A place in the room for a file that is to become `path`; None where that is on another file system."""
        unfinished = self.room / UNFINISHED
        unfinished.mkdir(parents=True, exist_ok=True)
        if unfinished.stat().st_dev != path.parent.stat().st_dev:
            return None
        self._written += 1
        return unfinished / f"{os.getpid()}-{self._written}{path.suffix}"

    def admit(self, path: Path, temporary: Path) -> None:
        """Take note of a finished file that is about to become `path`, and clear its place."""
        self.make_way(path)
        self.record(path, temporary)

    def record(self, path: Path, content: Path | None = None, digest: str | None = None) -> None:
        """Note that the file at `path` is ours, with the bytes of `content`, by default its own."""
        content = content or path
        status, name = content.stat(), self._name(path)
        record = Record(status.st_size, status.st_mtime_ns, digest or sha256(content))
        self._known[name] = [*self._known.get(name, []), record][-KEPT:]
        self._new.add(name)
        append_line(self.room / MANIFEST, json.dumps([name, *record]))

    def record_folder(self, path: Path) -> None:
        """Note that the folder at `path`, which has a room of its own, belongs to this one."""
        if (name := self._name(path)) not in self._inner:
            self._inner.add(name)
            append_line(self.room / MANIFEST, json.dumps([f"{name}/"]))

    def holds(self, path: Path) -> bool:
        """Whether the file at `path` is one that we wrote, unchanged."""
        records = self._known.get(self._name(path), ())
        try:
            status = path.lstat()
            alike = [record for record in records if record.size == status.st_size]
            if self._name(path) in self._new and any(record.mtime_ns == status.st_mtime_ns for record in alike):
                return True
            return bool(alike) and sha256(path) in {record.sha256 for record in alike}
        except OSError:
            return False

    def extends(self, path: Path) -> bool:
        """Whether the file at `path` begins with one that we wrote, as a log does of which no hash is known yet."""
        try:
            content = path.read_bytes()
        except OSError:
            return False
        known = self._known.get(self._name(path), ())
        return any(hashlib.sha256(content[: record.size]).hexdigest() == record.sha256 for record in known)

    def is_known(self, path: Path) -> bool:
        """Whether we wrote a file at `path`, which may have been changed since."""
        return self._name(path) in self._known

    def digests(self, path: Path) -> set[str]:
        """The hashes under which a file at `path` is ours."""
        return {record.sha256 for record in self._known.get(self._name(path), ())}

    def make_way(self, path: Path) -> None:
        """Move a file at `path` that is not ours aside."""
        if os.path.lexists(path) and not path.is_dir() and not self.holds(path):
            set_aside(path)

    def remove(self, path: Path) -> None:
        """Remove the file at `path` where it is ours; move it aside where it is not."""
        if self.holds(path):
            path.unlink()
        else:
            self.make_way(path)

    def clear(self, keep: Callable[[str], bool] = lambda name: False) -> None:
        """Remove all files that are ours and whose names are not to `keep`, and folders that are empty then.

        Rooms of folders below go with their files. Files that were changed since stay where they are. A kill at any
        moment leaves what a second call removes, which is why the folders of a file that is gone already count too.
        """
        emptied = set()
        for name in [name for name in self._known if not keep(name)]:
            path = self.root / name
            if self.holds(path):
                path.unlink()
            emptied |= {folder for folder in path.parents if self.depth(folder)}
            del self._known[name]
        for name in [name for name in self._inner if not keep(name)]:
            folder = self.root / name
            if is_room(folder / ROOM):
                inner = Owned(folder)
                inner.clear()
                inner.leave()
            emptied |= {folder / ROOM, folder, *(parent for parent in folder.parents if self.depth(parent))}
            self._inner.remove(name)
        remove_empty(emptied)
        self._compact()

    def leave(self) -> None:
        """Remove the room, and the root where it is empty then; the marker last, by which a kill leaves a room."""
        with contextlib.suppress(OSError):
            for entry in (entry for entry in self.room.iterdir() if entry.name != MARKER):
                drop(entry)
        shutil.rmtree(self.room, ignore_errors=True)
        remove_empty({self.root})

    def tidy(self) -> None:
        """Remove what a killed command left unfinished, and shorten the manifest."""
        shutil.rmtree(self.room / UNFINISHED, ignore_errors=True)
        (self.room / UNFINISHED).mkdir(exist_ok=True)
        self._compact()

    def _name(self, path: Path) -> str:
        absolute = os.path.abspath(path)
        root = max((root for root in self._roots if absolute.startswith(root + os.sep)), key=len)
        return absolute[len(root) + 1 :].replace(os.sep, "/")

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for line in (self.room / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # half a line, of a stopped machine
                    name, *record = json.loads(line)
                    if not _is_below(name):
                        continue
                    if record:
                        self._known[name] = [*self._known.get(name, []), Record(*record)][-KEPT:]
                    else:
                        self._inner.add(name.removesuffix("/"))

    def _compact(self) -> None:
        lines = [json.dumps([name, *record]) + "\n" for name, records in self._known.items() for record in records]
        lines += [json.dumps([f"{name}/"]) + "\n" for name in sorted(self._inner)]
        if (self.room / MANIFEST).exists() or lines:
            partial = self.room / f"{MANIFEST}.part"
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(self.room / MANIFEST)


def _is_below(name: object) -> bool:
    """Whether a name in the manifest is that of a file below its folder, as all are that we wrote."""
    return isinstance(name, str) and name.isprintable() and not {"", ".", ".."} & set(name.removesuffix("/").split("/"))


def of(path: Path) -> Owned | None:
    """The innermost folder of ours that is open and that `path` is below."""
    return files.keeper_of(path)


def remove(path: Path) -> None:
    """Remove a file of an open folder where it is ours, or move it aside; a file of no open folder is left alone."""
    owner = of(path)
    if owner is not None:
        owner.remove(path)


def drop(path: Path) -> None:
    """Remove a file or folder that is in a room, where everything is ours, or that says itself that it is ours."""
    if path.is_dir() and not path.is_symlink():
        if not any(is_room(folder) for folder in path.parents):
            raise ValueError(f"{path} is in no room of dmquant's")
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Give a file or folder that is not ours another name beside its own, which is told; returns the new path."""
    aside = free_name(path.with_name(path.name + ASIDE))
    path.rename(aside)
    logging.getLogger("dmquant").warning(
        "note: %s was not written by dmquant, or changed since: it is now %s", path, aside
    )
    return aside


def free_name(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that nothing has."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def remove_empty(folders: set[Path]) -> None:
    """Remove those of the folders that are empty, inner ones first."""
    for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def claimed(root: Path) -> Iterator[Owned]:
    """Hold the folder `root`, which is made if need be, alone until the block ends.

    Raises UserError where it cannot be written, has something of another's in the room's place, or is being written by
    another command.
    """
    outer = of(root / ROOM)
    with _held(root, root / ROOM) as owned:
        if outer is not None:
            outer.record_folder(root)
        yield owned


@contextlib.contextmanager
def joined(root: Path) -> Iterator[Owned]:
    """Write to the folder `root` until the block ends, as the process that holds it does, or beside it."""
    held = next((one for one in files.keepers if os.path.samefile(one.root, root)), None)
    if held is not None:
        yield held
        return
    furnish(root / ROOM)
    with _open(Owned(root)) as owned:
        yield owned


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, held alone until the block ends: for work on what will be `folder`.

    In a block within a block of the same process it is the same one. It is removed at the end of the outer block; where
    that fails, what was worked out in it stays for the next command.
    """
    folder = folder.resolve()
    room = folder.with_name(f".{folder.name}{ROOM}")
    if any(one.room == room for one in files.keepers):
        yield room
        return
    with _held(room, room, f"the workspace of {folder}") as owned:
        try:
            yield room
        except BaseException:
            entries = {entry.name for entry in room.iterdir()} - {MARKER, LOCK, MANIFEST, UNFINISHED}
            if not entries:
                owned.leave()
            raise
        owned.leave()


@contextlib.contextmanager
def _held(root: Path, room: Path, what: str | None = None) -> Iterator[Owned]:
    try:
        furnish(room)
        lock = (room / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}; choose another folder with --out") from error
    with lock:
        lock_alone(lock, what or root)
        owned = Owned(root, room)
        owned.tidy()
        with _open(owned):
            yield owned


@contextlib.contextmanager
def _open(owned: Owned) -> Iterator[Owned]:
    files.keepers.append(owned)
    try:
        yield owned
    finally:
        files.keepers.remove(owned)
