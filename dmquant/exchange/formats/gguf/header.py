"""The header of a GGUF file: its tensors and its metadata, checked against the file's length. No weight is read.

The format: docs/gguf.md of ggml. gguf's own reader maps the file and believes what it says.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.host import weight_file

MAGIC = b"GGUF"
SHAPES = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF's prefix of metadata: the shape of a tensor that was flattened to rows of 256."""
_VERSIONS, _MOST_DIMENSIONS, _ALIGNMENT = (2, 3), 4, 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Kind(NamedTuple):
    """A type of tensor in ggml: its name, the weights of a block, and the block's bytes."""

    name: str
    size: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18),
    23: Kind("IQ4_XS", 256, 136),
    30: Kind("BF16", 1, 2),
}
"""Types that diffusion models come in, by ggml's numbers."""
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def header(path: Path) -> tuple[dict[str, weight_file.Tensor], dict[str, str]]:
    """The tensors by name, with dtypes such as "Q4_K", and the metadata as text; lists of whole numbers as "[1, 2]".

    Shapes are those of the weights, (out, in); what `comfy.gguf.orig_shape` says replaces that of a flattened one.
    Raises UserError for a file that is truncated, of another version, or with types of tensors that are unknown here.
    """
    weight_file.check_regular(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file.read).parse()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): get that file again") from None


def read(path: Path, tensor: weight_file.Tensor) -> Tensor:
    """A tensor in high precision as stored, another as its bytes (rows, bytes of a row); read now."""
    with path.open("rb") as file:
        file.seek(tensor.begin)
        data = torch.frombuffer(bytearray(file.read(tensor.end - tensor.begin)), dtype=torch.uint8)
    if tensor.dtype in PLAIN:
        return data.view(PLAIN[tensor.dtype]).view(tensor.shape)
    return data


class _Reader:
    """A header as it is read, never more of it than the file has."""

    def __init__(self, path: Path, read: Any):
        self.path, self.length, self.at, self._read = path, path.stat().st_size, 0, read

    def parse(self) -> tuple[dict[str, weight_file.Tensor], dict[str, str]]:
        magic, version = self.take(len(MAGIC)), self.one("I")
        if magic != MAGIC or version not in _VERSIONS:
            raise UserError(f"{self.path} is no GGUF file of version {' or '.join(map(str, _VERSIONS))}")
        count, entries = self.one("Q"), self.one("Q")
        metadata = dict(self.entry() for _ in range(self.fits(entries, 13)))
        infos = dict(self.info() for _ in range(self.fits(count, 33)))
        if len(infos) < count:
            raise self.damaged("two tensors have one name")
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise self.damaged("its alignment is 0")
        first = -(-self.at // alignment) * alignment
        return {name: self.placed(name, info, first, metadata) for name, info in infos.items()}, metadata

    def placed(self, name: str, info: tuple, first: int, metadata: dict[str, str]) -> weight_file.Tensor:
        shape, number, offset = info
        if number not in KINDS:
            raise UserError(f"{self.path}: '{name}' is in ggml's type {number}, which is not read here")
        kind = KINDS[number]
        elements = 1
        for side in shape:
            elements *= side
        if not shape or not elements or shape[-1] % kind.size:
            raise self.damaged(f"'{name}' of shape {list(shape)} is no whole blocks of {kind.name}")
        begin = first + offset
        end = begin + elements // kind.size * kind.nbytes
        if end > self.length:
            raise self.damaged(f"'{name}' ends at byte {end} of {self.length}")
        if (flattened := metadata.get(SHAPES + name)) is not None:
            shape = self.original(name, flattened, elements)
        return weight_file.Tensor(kind.name, shape, begin, end)

    def original(self, name: str, text: str, elements: int) -> tuple[int, ...]:
        shape = tuple(int(side) for side in text.strip("[]").split(",") if side.strip().isdecimal())
        product = 1
        for side in shape:
            product *= side
        if product != elements:
            raise self.damaged(f"'{name}' of {elements} weights cannot have the shape {text}")
        return shape

    def entry(self) -> tuple[str, str]:
        name, kind = self.string(), self.one("I")
        return name, self.value(kind)

    def value(self, kind: int) -> str:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.one("I"), self.one("Q")
            if inner == _STRING:
                return str([self.string() for _ in range(self.fits(count, 8))])
            code = self.code(inner)
            return str(list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code)))))
        return str(self.one(self.code(kind)))

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.damaged(f"metadata of type {kind}")
        return _SCALARS[kind]

    def info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dimensions = self.string(), self.one("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.damaged(f"'{name}' has {dimensions} dimensions")
        sides = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        return name, (sides[::-1], self.one("I"), self.one("Q"))

    def string(self) -> str:
        return self.take(self.one("Q")).decode()

    def one(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def fits(self, count: int, nbytes: int) -> int:
        """`count`, if so many things of at least `nbytes` bytes may follow."""
        if count * nbytes > self.length - self.at:
            raise self.damaged(f"{count} entries in {self.length} bytes")
        return count

    def take(self, count: int) -> bytes:
        self.at += self.fits(count, 1)
        return self._read(count)

    def damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is truncated or damaged ({reason}): get that file again")
