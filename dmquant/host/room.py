"""The hidden room of a folder: ours by the marker in it, and locked by the one command that writes the folder."""

import errno
from pathlib import Path

from dmquant.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: a folder is not protected against a second writer
    fcntl = None

ROOM, MARKER, LOCK, MANIFEST, UNFINISHED = ".dmquant", "README", "lock", "manifest.jsonl", "unfinished"
ABOUT = (
    "dmquant keeps its notes on the files beside this folder here: which of them it wrote, and so may replace.\n"
    "Without these notes it takes all of them for yours.\n"
)


def is_room(folder: Path) -> bool:
    """Whether a folder is one of ours, to do with as we like: it holds our marker."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8") == ABOUT
    except (OSError, ValueError):
        return False


def furnish(room: Path) -> None:
    """Make a room; UserError where something else has its place, OSError as the disk."""
    room.mkdir(parents=True, exist_ok=True)
    if not is_room(room):
        if not all(_is_half_made(entry) for entry in room.iterdir()):
            raise UserError(f"{room} is in the way, and is not of dmquant: move or remove it")
        (room / MARKER).write_text(ABOUT, encoding="utf-8")
    (room / UNFINISHED).mkdir(exist_ok=True)


def _is_half_made(entry: Path) -> bool:
    """Whether an entry of a room without a marker is what a command leaves that was killed while it made the room."""
    try:
        return {MARKER: ABOUT, LOCK: ""}[entry.name].startswith(entry.read_text(encoding="utf-8"))
    except (LookupError, OSError, ValueError):
        return False


def lock_alone(file, what: object) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        raise UserError(
            f"another dmquant is writing {what}; wait for it, or choose another folder with --out"
        ) from None
