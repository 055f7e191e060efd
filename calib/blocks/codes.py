"""The codes of finished units on disk, so that a killed calibration continues where it was."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dmquant.host.files import json_sha256, replacing, sha256, write_text
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.recipe import Recipe
from dmquant.scaling import Scales
from dmquant.transforms import Parts, Storage

LAYOUT = 2  # version of the files of a unit, a part of their key
_SEAL = "record_sha256"


@dataclass(frozen=True)
class CodesFolder:
    """A folder with a safetensors file for each unit, and a JSON file with its checksum, key, facts and own hash."""

    path: Path
    key: str
    """Fingerprint of everything the codes depend on; files of another key are as good as absent."""

    def load(self, number: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the tensors of a finished unit, on the CPU in the names and shapes of `save`, and its facts.

        Returns None unless both files are whole and of this key.
        """
        file, record = self._files(number)
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            seal, made_by = content.pop(_SEAL), (content["key"], content["name"])
            is_whole = seal == _seal(content) and made_by == (self.key, name)
            data = file.read_bytes() if is_whole else b""
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not is_whole or hashlib.sha256(data).hexdigest() != content["sha256"]:
            return None
        # Not load_file: torch drops the KeyboardInterrupt of a Ctrl-C that falls into it, and raises a ValueError.
        return safetensors.torch.load(data), content["facts"]

    def save(self, number: int, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a finished unit, whole or not at all; tensors of any shape and dtype, by name."""
        file, record = self._files(number)
        with replacing(file) as partial:
            safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            checksum = sha256(partial)
        content = {"key": self.key, "name": name, "sha256": checksum, "facts": facts}
        write_text(record, json.dumps(content | {_SEAL: _seal(content)}, indent=1) + "\n")

    def drop(self, number: int) -> None:
        """Remove the files of a unit, if there are any."""
        for file in reversed(self._files(number)):
            file.unlink(missing_ok=True)

    def _files(self, number: int) -> tuple[Path, Path]:
        return self.path / f"{number:03d}.safetensors", self.path / f"{number:03d}.json"


def _seal(content: dict[str, Any]) -> str:
    """The hash of a record but for the time that it took, so that the same codes have the same record."""
    facts = {name: fact for name, fact in content["facts"].items() if name != "seconds"}
    return json_sha256(content | {"facts": facts})


def meaning_of(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its codes depend on: all but its name and description."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("name", "description")}


def tensors_of(values: Mapping[str, QuantizedTensor], parts: Mapping[str, dict[str, Parts]]) -> dict[str, Tensor]:
    """The stored tensors of quantized weights and of the transforms of their layers, by the names to save them under.

    Shapes and dtypes are as stored: `NAME.codes` packed uint8, `NAME.scale` in the spec's store, `NAME.METHOD_PART`.
    """
    tensors = {
        f"{name}.{method}_{part}": tensor
        for name in values
        for method, stored in parts[name].items()
        for part, tensor in stored.items()
    }
    for name, value in values.items():
        tensors[f"{name}.codes"], tensors[f"{name}.scale"] = value.codes, value.scales.stored
        if value.scales.base is not None:
            tensors[f"{name}.base"] = value.scales.base
    return tensors


def weight_of(tensors: Mapping[str, Tensor], name: str, spec: WeightSpec, shape: tuple[int, ...]) -> QuantizedTensor:
    """The quantized weight of the layer `name`, of this `shape` (out, in, ...), from the tensors of `tensors_of`."""
    scales = Scales(tensors[f"{name}.scale"], tensors.get(f"{name}.base"), spec.store)
    return QuantizedTensor(tensors[f"{name}.codes"], scales, spec, shape)


def parts_of(tensors: Mapping[str, Tensor], name: str, transforms: Iterable[Storage]) -> dict[str, Parts]:
    """The stored tensors, of any shape, of a layer's transforms by transform and part, from those of `tensors_of`."""
    return {one.name: {part: tensors[f"{name}.{one.name}_{part}"] for part in one.parts()} for one in transforms}
