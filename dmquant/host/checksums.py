"""checksums.json of a folder: size and SHA-256 of every file in it, and of each tensor of its safetensors files.

Hidden files and what is in hidden folders are not recorded: Git, the Hub's client and desktops put them there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dmquant.errors import UserError
from dmquant.host import weight_file
from dmquant.host.files import write_text
from dmquant.host.hashes import sha256_once

NAME = "checksums.json"
VERSION = 1
WEIGHTS = ".safetensors"
LARGEST = 1 << 28  # bytes of a checksums.json: enough for a million tensors
BLOCK = 1 << 20
CHANGED, ADDED = "is not what was saved", "was not saved with the model"

Record = dict[str, dict[str, Any]]

_of_file: dict[tuple[int, ...], dict[str, Any]] = {}


def write(folder: Path) -> None:
    """Record every file of `folder`; to be called when all of them are written. UserError where that cannot be."""
    names = _files(folder)
    with _threads() as threads:
        entries = threads.map(lambda name: _entry(folder / name), names)
        write_text(folder / NAME, _text(dict(zip(names, entries, strict=True))))


def rewritten(folder: Path, names: Iterable[str]) -> None:
    """Record the named files anew, which may have been replaced since; nothing where the folder has no record."""
    if not (folder / NAME).is_file():
        return
    record, now = recorded(folder), {name: _entry(folder / name) for name in names}
    if record | now != record:
        write_text(folder / NAME, _text(record | now))


def recorded(folder: Path) -> Record:
    """What checksums.json says, by relative POSIX path: `size`, `sha256`; of weights also `header` and `tensors`.

    Raises UserError where it is missing or damaged.
    """
    path = folder / NAME
    weight_file.check_regular(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content["version"] > VERSION:
            raise UserError(f"{path} was written by a later dmquant: install that one to check the folder")
        if _text(content["files"]) != text or not all(_is_entry(*item) for item in content["files"].items()):
            raise ValueError("it is not as it was written")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): get that file again, or remove it") from None
    return content["files"]


def faults(folder: Path, counts: Callable[[str], bool] = lambda name: True, *, again: bool = True) -> list[str]:
    """A line for each file that is damaged, missing or additional, with the tensor; every byte is read, in threads.

    Only the files for whose relative POSIX path `counts` holds are looked at. Without `again`, a file that was read
    before and has not changed since by its size and time (`sha256_once`) is not read. Raises UserError as `recorded`.
    """
    record = recorded(folder)
    names = sorted(filter(counts, record))
    with _threads() as threads:
        if not again:
            known = threads.map(lambda name: _known(folder / name, record[name]), names)
            names = [name for name, holds in zip(names, known, strict=True) if not holds]
        found = [f"{name} {line}" for name in names for line in _differences(folder / name, record[name], threads)]
    extra = [name for name in _files(folder) if counts(name) and name not in record]
    return found + [f"{name} {ADDED}" for name in extra]


def outline_fault(file: Path) -> str | None:
    """What is wrong with the size or the header of a weight file, by the record of the folder above it or above that.

    None where nothing is wrong or nothing is recorded. Reads no weights. Raises UserError as `recorded` does.
    """
    for folder in list(file.absolute().parents)[:2]:
        if not (folder / NAME).is_file():
            continue
        entry = recorded(folder).get(file.absolute().relative_to(folder).as_posix())
        if entry is None:
            return ADDED
        return _outline_fault(file, entry)
    return None


def _files(folder: Path) -> list[str]:
    """Relative POSIX paths of what is in `folder` and its folders, in order, but hidden ones and the record."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
        found += [path for path in paths if path != NAME]
    return sorted(found)


def _text(record: Record) -> str:
    files = json.dumps(record, indent=1, sort_keys=True)
    own = hashlib.sha256(files.encode()).hexdigest()
    return f'{{"version": {VERSION}, "sha256": "{own}",\n"files": {files}}}\n'


def _is_entry(name: str, entry: dict[str, Any]) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    kinds = {"size": int, "sha256": str, "header": str, "tensors": dict}
    known = all(isinstance(value, kinds[key]) for key, value in entry.items())
    return inside and known and {"size", "sha256"} <= entry.keys()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _entry(path: Path) -> dict[str, Any]:
    """The record of one file; of several names of one large file it is read once."""
    weight_file.check_regular(path)
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity not in _of_file:
        entry = {"size": status.st_size, "sha256": _sha256(path, 0, status.st_size)}
        if path.suffix == WEIGHTS:
            tensors = {name: _sha256(path, each.begin, each.end) for name, each in weight_file.header(path).items()}
            entry |= {"header": _sha256(path, 0, weight_file.header_length(path)), "tensors": tensors}
        _of_file[identity] = entry
    return _of_file[identity]


def _sha256(path: Path, begin: int, end: int) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(BLOCK, end - begin)))
    with path.open("rb") as file:
        file.seek(begin)
        while count := file.readinto(block[: end - begin]):
            digest.update(block[:count])
            begin += count
    return digest.hexdigest()


def _known(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is what was saved, as far as a hash that is remembered tells."""
    try:
        weight_file.check_regular(path)
        return path.stat().st_size == entry["size"] and sha256_once(path) == entry["sha256"]
    except (UserError, OSError):
        return False


def _differences(path: Path, entry: dict[str, Any], threads: ThreadPoolExecutor) -> Iterator[str]:
    """What differs in one file from its record."""
    if fault := _outline_fault(path, entry):
        yield fault
    elif "tensors" not in entry:
        if _sha256(path, 0, entry["size"]) != entry["sha256"]:
            yield CHANGED
    else:
        tensors = weight_file.header(path)
        digests = threads.map(lambda tensor: _sha256(path, tensor.begin, tensor.end), tensors.values())
        for name, digest in zip(tensors, digests, strict=True):
            if entry["tensors"].get(name) != digest:
                yield f"{CHANGED}: tensor '{name}'"


def _outline_fault(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.exists():
        return "is missing"
    weight_file.check_regular(path)
    if (size := path.stat().st_size) != entry["size"]:
        return f"{CHANGED}: {size} bytes, not {entry['size']}"
    if "header" not in entry:
        return None
    length = weight_file.header_length(path)
    if length > size or _sha256(path, 0, length) != entry["header"]:
        return f"{CHANGED}: the names, dtypes and shapes of its tensors"
    return None
