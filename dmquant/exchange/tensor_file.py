"""Safetensors files, written and read tensor by tensor: one is in memory at a time.

The library's own `save_file` holds all tensors of a file at once. And its `safe_open` reads the whole header, so that
opening a file for each of its tensors takes longer than reading them.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dmquant.diffusers.tensors import DTYPES as OF_MODELS
from dmquant.errors import UserError
from dmquant.host import weight_file
from dmquant.host.files import replacing
from dmquant.host.units import size_text

DTYPES = {**OF_MODELS, "F8_E8M0": torch.float8_e8m0fnu}
"""Names of dtypes in the headers of safetensors files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to be written: what its header says, and how it is made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def stored(name: str, tensor: Tensor) -> Entry:
    """An entry of a small tensor that is there already."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the file, whole or not at all; `progress` is told of bytes written and bytes in all.

    Raises UserError where the disk lacks the room, before anything is made, and where it refuses; ValueError for two
    entries of one name, or one whose tensor is not what it says.
    """
    total = sum(entry.nbytes for entry in entries)
    check_room(path, total)
    with replacing(path) as temporary:
        fill(temporary, entries, metadata, lambda done: progress(done, total))


def fill(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], progress: Callable[[int], None]) -> None:
    """Write the file there and then, for a folder that is whole or not at all; `progress` is told of bytes written.

    Raises ValueError for two entries of one name, or one whose tensor is not what it says; OSError as the disk.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # so that each is aligned
    if len({entry.name for entry in ordered}) < len(ordered):
        raise ValueError("two tensors of a file have the same name")
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for entry in ordered:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for entry in ordered:
            tensor = entry.make()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(
                    f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}"
                )
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            done += entry.nbytes
            progress(done)


class Reader:
    """Safetensors files whose headers are read once, and their tensors by place."""

    def __init__(self, files: Iterable[Path]):
        self.headers = {path: weight_file.header(path) for path in files}
        self._file_of = {name: path for path, header in self.headers.items() for name in header}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def header(self, name: str) -> weight_file.Tensor:
        """Dtype, shape and place of a tensor."""
        return self.headers[self._file_of[name]][name]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, read now; UserError for a dtype that torch lacks, and where the file has changed."""
        path, place = self._file_of[name], self.header(name)
        if place.dtype not in DTYPES:
            raise UserError(f"{path}: '{name}' is of the dtype {place.dtype}, which cannot be read here")
        data = torch.empty(place.end - place.begin, dtype=torch.uint8)
        left = memoryview(data.numpy())
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(place.begin)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if left:
            raise UserError(f"{path} ends within '{name}': it was cut off since its header was read")
        return data.view(DTYPES[place.dtype]).view(place.shape)


def check_room(path: Path, nbytes: int) -> None:
    """UserError where the disk of `path` has not `nbytes` left."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < nbytes:
        raise UserError(f"{path} takes {size_text(nbytes)}, and its disk has {size_text(free)} left: make room")
