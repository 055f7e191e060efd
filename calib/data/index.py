"""The index of a folder of calibration data: settings, samples and checksums of shards, under a hash of its own.

It is written after every shard, so what it lists is whole unless the disk damaged it later. One that is damaged or gone
is made again of the shards.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.shard import SHARDS, Captured, Setup, shard_name
from dmquant.errors import UserError
from dmquant.host.files import json_sha256, sealed_json, sha256, take_seal, write_text

VERSION = 2
WITHOUT_HASH = 1  # the version before
INDEX = "index.json"
_BEGINNING = ('{"version": ', '"made_for": {')


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
    """Rows of one sample; 0 before the first shard."""
    timesteps: list[float] = field(default_factory=list)
    """The timestep of every backbone call."""
    weights: list[float] | None = None
    """Measured importance of every step, where the sampler needed it."""
    skeletons: list[Any] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Fingerprint of everything the data depends on."""
        return json_sha256(self.made_for)[:32]

    @property
    def setup(self) -> Setup:
        return Setup(self.made_for, self.prompts, self.steps, self.weights)

    def missing(self) -> list[int]:
        """Prompts that no shard holds."""
        held = {prompt for shard in self.shards for prompt in range(shard.start, shard.stop)}
        return [prompt for prompt in range(self.prompts) if prompt not in held]

    def add(self, captured: Captured, sha256: str) -> None:
        """List a shard."""
        self.timesteps, self.rows = captured.timesteps, captured.rows
        samples = []
        for kept in captured.kept:
            if kept.skeleton not in self.skeletons:
                self.skeletons.append(kept.skeleton)
            samples.append(StoredSample(kept.sample, self.skeletons.index(kept.skeleton), kept.leaves))
        samples.sort(key=lambda stored: (stored.sample.prompt, stored.sample.step))
        shard = Shard(captured.start, captured.stop, sha256, samples)
        self.shards = sorted([*self.shards, shard], key=lambda shard: shard.start)

    def save(self, folder: Path) -> None:
        """Write the index of `folder`."""
        write_text(folder / INDEX, json.dumps(sealed_json({"version": VERSION, **asdict(self)})))

    @classmethod
    def load(cls, folder: Path) -> "Index | None":
        """The index of `folder` as it was written, None where it is not there or damaged.

        Raises UserError for one that a later version of dmquant wrote.
        """
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            whole, version = take_seal(content), content.get("version")
            if not whole and (whole, version) != (None, WITHOUT_HASH):
                return None
            if version > VERSION:
                raise UserError(
                    f"{path} has version {version}, this dmquant reads {VERSION}: update it, or choose another folder"
                )
            content.pop("version")
            content["shards"] = [_shard(**shard) for shard in content["shards"]]
            return cls(**content)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    @classmethod
    def of_shards(cls, folder: Path) -> "Index | None":
        """The index of the shards in `folder` that are whole and have their settings in common, None without any."""
        index = None
        for path in sorted(folder.glob(SHARDS)):
            captured = Captured.read(path)
            if captured is None:
                continue
            if index is None:
                setup = captured.setup
                index = cls(setup.made_for, setup.prompts, setup.steps, weights=setup.weights)
            if captured.setup == index.setup and set(range(captured.start, captured.stop)) <= set(index.missing()):
                index.add(captured, sha256(path))
        return index


def is_damaged_index(folder: Path) -> bool:
    """Whether `folder` has a file that begins as an index does."""
    path = folder / INDEX
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(64).decode(errors="replace")
    return beginning.startswith(_BEGINNING[0]) and _BEGINNING[1] in beginning


def _shard(start: int, stop: int, sha256: str, samples: list[dict[str, Any]]) -> Shard:
    """A shard as asdict wrote it."""
    stored = [StoredSample(Sample(**each["sample"]), each["skeleton"], each["leaves"]) for each in samples]
    return Shard(start, stop, sha256, stored)
