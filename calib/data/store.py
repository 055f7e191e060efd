"""Calibration data on disk: arguments of the backbone's forward, each row stored once, read by memory map.

A folder holds `index.json` and safetensors shards, one a batch of prompts. A sample is one backbone call for one
prompt. Its tensors are cut into rows (the batch dimension), and rows with the same content are one tensor of the
shard: text embeddings are there once a prompt, unconditional ones once a shard, latents once for both guidance
branches. The index is written after every shard, so what it lists is whole unless the disk damaged it later.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.tree import unflatten
from dmquant.errors import UserError
from dmquant.host.files import json_sha256, replacing, sha256, write_text

VERSION = 1
INDEX = "index.json"
SHARDS = "prompts-*.safetensors"


@dataclass(frozen=True)
class StoredSample:
    """A sample and where its arguments are in its shard."""

    sample: Sample
    skeleton: int
    """Number of the index's skeleton that the tensors go into."""
    leaves: list[list[int] | int]
    """For every tensor of the skeleton the names of its rows, or one name where all rows share it whole."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file with the samples of the prompts from `start` up to `stop`."""

    start: int
    stop: int
    sha256: str
    samples: list[StoredSample]

    @property
    def name(self) -> str:
        """File name, as in `prompts-00000-00016.safetensors`."""
        return shard_name(self.start, self.stop)

    def is_whole(self, folder: Path) -> bool:
        """Whether the file in `folder` is the one that was written."""
        return (folder / self.name).is_file() and sha256(folder / self.name) == self.sha256


@dataclass
class Index:
    """The content of a folder, as far as it is captured, and the settings it was made for."""

    made_for: dict[str, Any]
    prompts: int
    steps: int
    """Backbone calls of one pipeline call."""
    rows: int = 0
    """Rows of one sample; 0 before the first shard, as `timesteps` is empty."""
    timesteps: list[float] = field(default_factory=list)
    weights: list[float] | None = None
    """Measured importance of every step, where the sampler needed it."""
    skeletons: list[Any] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Fingerprint of everything the data depends on."""
        return json_sha256(self.made_for)[:32]

    def missing(self) -> list[int]:
        """Prompts that no shard holds."""
        held = {prompt for shard in self.shards for prompt in range(shard.start, shard.stop)}
        return [prompt for prompt in range(self.prompts) if prompt not in held]

    def save(self, folder: Path) -> None:
        write_text(folder / INDEX, json.dumps({"version": VERSION, **asdict(self)}))

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """The index of `folder`; UserError where there is none, or one that this version does not read."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("version")
            if version != VERSION:
                raise UserError(f"{path} has version {version}, this dmquant reads {VERSION}; remove it to start anew")
            content["shards"] = [_shard(**shard) for shard in content["shards"]]
            return cls(**content)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no calibration data: it has no {INDEX}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None


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

    def save(self, folder: Path, start: int, stop: int, samples: list[StoredSample]) -> Shard:
        """Write the shard of the prompts from `start` up to `stop`."""
        with replacing(folder / shard_name(start, stop)) as temporary:
            save_file(self._tensors, temporary)
            return Shard(start, stop, sha256(temporary), samples)


class CalibrationStore:
    """Captured arguments of the backbone's forward, to be replayed in mini-batches of any samples. Read-only.

    `samples` lists the samples by prompt and step; `steps` counts the backbone calls of one pipeline call and
    `timesteps` holds the timestep of each; `rows` is the batch dimension of one sample (2 with guidance, else 1);
    `weights` are the measured importances of the steps or None; `key` stands for everything the data depends on.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        """Open a folder whose shards have just been checked or written; `CalibrationStore.open` checks them."""
        self.steps, self.timesteps, self.rows = index.steps, index.timesteps, index.rows
        self.weights, self.key = index.weights, index.key
        self._folder, self._skeletons = folder, index.skeletons
        self._places = [(shard, stored) for shard in index.shards for stored in shard.samples]
        self.samples = [stored.sample for _, stored in self._places]
        self._file = functools.cache(lambda name: safe_open(folder / name, framework="pt"))

    @classmethod
    def open(cls, folder: Path) -> "CalibrationStore":
        """Open the data in `folder`; UserError where it is not all there or a checksum does not match."""
        index = Index.load(folder)
        damaged = [shard.name for shard in index.shards if not shard.is_whole(folder)]
        if damaged:
            raise UserError(f"{folder / damaged[0]} is damaged; capture again to replace it alone")
        if index.missing():
            raise UserError(f"the calibration data in {folder} is not finished; capture again to continue it")
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the backbone's forward for the samples `indices`, in that order.

        The `rows` rows of a sample stay together: [sample 0 unconditional, sample 0 conditional, sample 1 ...].
        Tensors without dimensions become one value a row, so samples of different timesteps mix. Raises UserError for
        samples that differ in what is passed once for all rows.
        """
        places = [self._places[index] for index in indices]
        shards = [shard.name for shard, _ in places]
        skeletons = {stored.skeleton for _, stored in places}
        if len(skeletons) != 1:
            raise UserError(f"samples {list(indices)} cannot share a batch: the pipeline passed them other arguments")
        leaves = zip(*(stored.leaves for _, stored in places), strict=True)
        tensors = [self._leaf(shards, names).to(device) for names in leaves]
        return (), unflatten(self._skeletons[skeletons.pop()], tensors)

    def _leaf(self, shards: list[str], names: Sequence[list[int] | int]) -> Tensor:
        places = list(zip(shards, names, strict=True))
        if isinstance(names[0], list):
            return torch.stack([self._tensor(shard, row) for shard, rows in places for row in rows])
        first, *others = [self._tensor(*place) for place in dict.fromkeys(places)]
        if not all(torch.equal(first, other) for other in others):
            raise UserError("these samples cannot share a batch: a tensor that all rows share differs between them")
        return first.clone()

    def _tensor(self, shard: str, name: int) -> Tensor:
        return self._file(shard).get_tensor(str(name))


def shard_name(start: int, stop: int) -> str:
    return SHARDS.replace("*", f"{start:05d}-{stop:05d}")


def remove_shards(folder: Path, keep: Sequence[Shard] = ()) -> None:
    """Remove shards that `keep` does not name, and what a killed capture left half written."""
    names = {shard.name for shard in keep}
    for path in folder.glob(f"*{SHARDS}"):
        if path.name not in names:
            path.unlink()


def _shard(start: int, stop: int, sha256: str, samples: list[dict[str, Any]]) -> Shard:
    """A shard as asdict wrote it."""
    stored = [StoredSample(Sample(**each["sample"]), each["skeleton"], each["leaves"]) for each in samples]
    return Shard(start, stop, sha256, stored)
