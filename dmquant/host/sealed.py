"""Safetensors files that carry a hash of their own content, so that a changed bit is noticed with nothing beside them.

The hash is SHA-256 of the whole file, with zeros in the place of the hash.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dmquant.host.files import replacing

_KEY = "dmquant"  # one alone: safetensors writes several in any order
_MARK, _NOTHING = rb"{\"seal\": \"", b"0" * 64  # as JSON within the JSON of the header
_BLOCK = 1 << 22  # bytes


def save_sealed(path: Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write contiguous tensors of any shape and dtype, and what JSON can hold about them; whole or not at all.

    Raises UserError when the operating system refuses.
    """
    with replacing(path) as partial:
        said = json.dumps({"seal": _NOTHING.decode(), "about": about})
        safetensors.torch.save_file(dict(tensors), partial, metadata={_KEY: said})
        with partial.open("r+b") as file:
            size = file.read(8)
            header = file.read(int.from_bytes(size, "little"))
            digest = hashlib.sha256(size + header)
            while block := file.read(_BLOCK):
                digest.update(block)
            file.seek(len(size) + header.index(_MARK) + len(_MARK))
            file.write(digest.hexdigest().encode())


def load_sealed(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors, on the CPU, and what was said about them; None unless the file is there and as it was written."""
    about = sealed_about(path)
    if about is None:
        return None
    # Not load_file: torch drops the KeyboardInterrupt of a Ctrl-C that falls into it.
    return safetensors.torch.load(path.read_bytes()), about


def sealed_about(path: Path) -> Any | None:
    """What was said about the tensors of a file, read once as a stream; None unless it is as it was written."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            size = file.read(8)
            length = int.from_bytes(size, "little")
            if length > path.stat().st_size:
                return None
            header = file.read(length)
            start = header.index(_MARK) + len(_MARK)
            seal = header[start : start + len(_NOTHING)]
            digest = hashlib.sha256(size + header[:start] + _NOTHING + header[start + len(_NOTHING) :])
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest().encode() != seal:
            return None
        return json.loads(json.loads(header)["__metadata__"][_KEY])["about"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
