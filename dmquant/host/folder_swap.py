"""Put a finished folder in the place of an older one of ours, without losing what the user has in that."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from dmquant.host import owned
from dmquant.host.files import sha256


def take_place(new: Path, folder: Path, room: Path, listed: Callable[[Path], Mapping[str, str] | None]) -> Path | None:
    """Put the finished folder `new` in the place of `folder`, and files of the user's back that were in that.

    `room` is a workspace on the same file system; `listed` gives the SHA-256 of each file that we wrote in such a
    folder, by its relative path, or None where we wrote one without a list. Returns where such a one went as a whole.
    """
    settle(folder, room, listed)
    old = room / "old"
    if os.path.lexists(folder):
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if os.path.lexists(old):
            old.rename(folder)
        raise
    return settle(folder, room, listed)


def settle(folder: Path, room: Path, listed: Callable[[Path], Mapping[str, str] | None]) -> Path | None:
    """Finish what `take_place` began, also where it was killed."""
    old, owner = room / "old", owned.of(folder / owned.ROOM)
    if not os.path.lexists(old):
        return None
    if not os.path.lexists(folder):
        old.rename(folder)
        return None
    ours, entries = listed(old), list(old.rglob("*"))
    paths = [path for path in entries if path.is_symlink() or not path.is_dir()]
    empty = [path.relative_to(old) for path in entries if path not in paths and not any(path.iterdir())]
    if ours is None:
        aside = owned.free_name(folder.with_name(folder.name + owned.ASIDE))
        old.rename(aside)
        return aside
    for path in paths:
        name = path.relative_to(old)
        known = {ours.get(name.as_posix())} | (owner.digests(folder / name) if owner else set())
        if not path.is_symlink() and sha256(path) in known:
            path.unlink()
            continue
        back = folder / name
        back.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(back):
            back = owned.free_name(back.with_name(back.name + owned.ASIDE))
            logging.getLogger("dmquant").warning(
                "note: %s was changed since dmquant wrote it: it is now %s", name, back
            )
        path.rename(back)
    for name in empty:
        (folder / name).mkdir(parents=True, exist_ok=True)
    owned.remove_empty({path for path in entries if path not in paths} | {old})
    return None
