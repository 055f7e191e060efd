"""The header of a safetensors file: names, dtypes, shapes and places of its tensors. No weight is read."""

import json
import stat
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dmquant.errors import UserError

LENGTH = 8  # bytes of the header's length, at the start of the file
_LFS_POINTER = b"version https://git-lfs"
_OTHERS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a zip archive (a .ckpt or .pt of torch, perhaps)",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
"""First bytes of what is taken for safetensors by mistake."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: dtype as safetensors writes it ("F32", "U8"), shape, and its bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, in the order of their bytes; these fill the file after its header.

    Raises UserError, naming the file, for one that is missing, no regular file, not readable, truncated or damaged.
    """
    check_regular(path)
    try:
        # Opening checks the header: every tensor's dtype and shape against its byte range, and those ranges against
        # each other and the length of the file.
        with safe_open(path, framework="pt"):
            pass
        first = header_length(path)
        with path.open("rb") as file:
            entries = json.loads(file.read(first)[LENGTH:])
        tensors = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))


def header_length(path: Path) -> int:
    """Bytes of a safetensors file before its first tensor, as its first bytes say."""
    with path.open("rb") as file:
        return LENGTH + int.from_bytes(file.read(LENGTH), "little")


def check_regular(path: Path) -> None:
    """UserError unless `path` is a regular file or a link to one: others can be read for ever, or not at all."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: get that file again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: put the file itself there")


def _damaged(path: Path, error: Exception) -> UserError:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_LFS_POINTER))
    except OSError as unreadable:
        return UserError(f"cannot read {path}: {unreadable.strerror or unreadable}")
    if beginning == _LFS_POINTER:
        return UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    for magic, kind in _OTHERS.items():
        if beginning.startswith(magic):
            return UserError(f"{path} is {kind}, no safetensors file: give the weights")
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} is truncated or damaged ({reason}): get that file again")
