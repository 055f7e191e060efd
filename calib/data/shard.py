"""Shards of calibration data: a sealed safetensors file for each batch of prompts.

A sample is one backbone call for one prompt. Its tensors are cut into rows (the batch dimension), and rows with the
same content are one tensor of the shard: text embeddings are there once a prompt, unconditional ones once a shard,
latents once for both guidance branches. A shard tells what its tensors are, so that the index can be made of shards.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.data.sampling import Sample
from dmquant.host import owned
from dmquant.host.files import sha256
from dmquant.host.sealed import save_sealed, sealed_about

SHARDS = "prompts-*.safetensors"
_NAME = re.compile(r"prompts-\d+-\d+\.safetensors")
_PARTIAL = re.compile(r"\.(prompts-\d+-\d+|index)\.\d+(\.dmquant)?\.(safetensors|json)")


@dataclass(frozen=True)
class Setup:
    """What all shards of a folder have in common."""

    made_for: dict[str, Any]
    prompts: int
    steps: int
    """Backbone calls of one pipeline call."""
    weights: list[float] | None
    """Measured importance of every step, where the sampler needed it."""


@dataclass(frozen=True)
class Kept:
    """A sample and where its arguments are in its shard."""

    sample: Sample
    skeleton: Any
    """The arguments, with the numbers of tensors in their places."""
    leaves: list[list[int] | int]
    """For every tensor of the skeleton the names of its rows, or one name where all rows share it whole."""


@dataclass(frozen=True)
class Captured:
    """The content of a shard: the samples of the prompts from `start` up to `stop`."""

    setup: Setup
    start: int
    stop: int
    timesteps: list[float]
    """The timestep of every backbone call of a pipeline call."""
    rows: int
    """Rows of one sample."""
    kept: list[Kept]

    @property
    def name(self) -> str:
        return shard_name(self.start, self.stop)

    @classmethod
    def read(cls, path: Path) -> "Captured | None":
        """What a shard tells of itself; None unless it is there, and whole."""
        about = sealed_about(path)
        try:
            kept = [Kept(Sample(**one["sample"]), one["skeleton"], one["leaves"]) for one in about.pop("kept")]
            captured = cls(Setup(**about.pop("setup")), **about, kept=kept)
            return captured if captured.name == path.name else None
        except (AttributeError, TypeError, LookupError):
            return None


class ShardWriter:
    """Collects the tensors of one shard, those with the same content once."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[bytes, int] = {}

    def add(self, tensor: Tensor) -> tuple[int, bool]:
        """Keep a CPU copy of a tensor of any shape and dtype; returns its name in the shard, and whether it is new."""
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        content = digest.digest()
        is_new = content not in self._names
        if is_new:
            self._names[content] = len(self._names)
            self._tensors[str(self._names[content])] = tensor.clone()
        return self._names[content], is_new

    def digest(self, name: int) -> str:
        """SHA-256 of the dtype, shape and content of the tensor with this name."""
        return list(self._names)[name].hex()

    def save(self, folder: Path, captured: Captured) -> str:
        """Write the shard; returns its SHA-256."""
        path = folder / captured.name
        save_sealed(path, self._tensors, dataclasses.asdict(captured))
        return sha256(path)


def shard_name(start: int, stop: int) -> str:
    """File name, as in `prompts-00000-00016.safetensors`."""
    return SHARDS.replace("*", f"{start:05d}-{stop:05d}")


def is_ours(name: str) -> bool:
    """Whether a file has the name of a shard, or of a file that a killed capture left half written."""
    return bool(_NAME.fullmatch(name) or _PARTIAL.fullmatch(name))


def remove_shards(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove shards whose names are not to `keep`, and what a killed capture left half written; nothing else."""
    for path in folder.glob("*"):
        is_shard = _NAME.fullmatch(path.name) and path.name not in keep and Captured.read(path)
        if is_shard or _PARTIAL.fullmatch(path.name):
            owned.drop(path)
