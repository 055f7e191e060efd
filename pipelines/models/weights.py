"""The files that hold the weights of a pipeline's part: whole or in shards, plain or of a variant such as fp16."""

import re
from pathlib import Path

from dmquant.errors import UserError
from dmquant.host import json_file

_FILE = re.compile(r"(?:model|diffusion_pytorch_model)(?:[.-].*)?\.safetensors")
_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")
_PICKLES = (".bin", ".pt", ".ckpt")


def safetensors_files(part: Path) -> list[Path]:
    """A part's safetensors files, in order; a link into the Hub's cache whose file is gone counts as none."""
    return sorted(path for path in part.glob("*.safetensors") if path.exists())


def variants(part: Path) -> set[str | None]:
    """The variants that a part's weights are there in; None for plain files."""
    return {_variant(path) for path in safetensors_files(part) if _FILE.fullmatch(path.name)}


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that diffusers or transformers load a part from, asked for `variant`.

    Where that is not there they take the plain files; without those, here the only variant counts. Empty for a part
    without weights.
    """
    present = variants(part)
    chosen = next((each for each in (variant, None) if each in present), next(iter(present), None))
    files = [path for path in safetensors_files(part) if _FILE.fullmatch(path.name) and _variant(path) == chosen]
    single = [path for path in files if "-of-" not in path.name]
    index = next((each for each in _indexes(part) if _variant_of_index(each) == chosen), None)
    if index is None or (single and single[0].name.startswith("model")):  # transformers prefers one file to shards
        return single
    return [part / name for name in sorted(_shards(index))]


def missing_files(part: Path) -> list[str]:
    """Weight files that a part's folder should hold and does not; one whole variant of them is enough."""
    present = {path.name for path in safetensors_files(part)}
    sharded = [_shards(path) for path in _indexes(part)]
    if any("-of-" not in name for name in present) or any(shards <= present for shards in sharded):
        return []
    if sharded:
        return sorted(min((shards - present for shards in sharded), key=len))
    if present:
        return ["*.safetensors.index.json"]
    pickled = any(path.suffix in _PICKLES for path in part.iterdir())
    return ["*.safetensors" + (" (pickled weights are there, but can run code when opened)" if pickled else "")]


def is_variant(name: str) -> bool:
    """Whether a file's name is that of weights, or of their index, in a variant such as fp16."""
    path = Path(name)
    return (_variant_of_index(path) if path.suffix == ".json" else _variant(path)) is not None


def _variant(path: Path) -> str | None:
    return match[1] if (match := _VARIANT.search(path.name)) else None


def _indexes(part: Path) -> list[Path]:
    return sorted(part.glob("*.safetensors.index*.json"))


def _variant_of_index(path: Path) -> str | None:
    return path.name.partition(".safetensors.index.")[2].removesuffix("json").removesuffix(".") or None


def _shards(index: Path) -> set[str]:
    """Names of the files that an index of shards lists, all in its own folder."""
    listed = json_file.read_object(index).get("weight_map", {})
    if not isinstance(listed, dict) or not all(isinstance(n, str) and Path(n).name == n for n in listed.values()):
        raise UserError(f"{index} lists no files of its own folder: get that file again")
    return set(listed.values())
