"""Diffusers pipeline folders on disk: what they hold, and whether it is whole. Reads no weights."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dmquant.errors import UserError

INDEX = "model_index.json"
_LFS_POINTER = b"version https://git-lfs"
_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")
_PICKLES = (".bin", ".pt", ".ckpt")


def pipeline_class(folder: Path) -> str:
    """Class name of the pipeline in `folder`; UserError for anything that is not a diffusers pipeline folder."""
    if not folder.exists():
        raise UserError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file: give a diffusers folder "
            "(a single-file checkpoint becomes one with diffusers' from_single_file and save_pretrained)"
        )
    if not (folder / INDEX).is_file():
        component = (folder / "config.json").is_file()
        what = "a single component, not a whole pipeline" if component else "no diffusers pipeline"
        raise UserError(f"{folder} is {what}: it has no {INDEX}")
    name = read_json(folder / INDEX).get("_class_name")
    if not isinstance(name, str):
        raise UserError(f"{folder / INDEX} names no pipeline class of diffusers (pipelines with own code are not run)")
    return name


def components(folder: Path) -> list[str]:
    """Names of the pipeline's parts that come from files, as its index lists them."""
    entries = read_json(folder / INDEX).items()
    return [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None]


def image_size(folder: Path, backbone: str) -> tuple[int, int] | None:
    """Height and width in pixels that the backbone was made for: its latent size times the VAE's downsampling.

    None where their configurations do not tell.
    """
    sample, vae = read_json(folder / backbone / "config.json").get("sample_size"), folder / "vae" / "config.json"
    config = read_json(vae) if vae.is_file() else {}
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    sizes = sample if isinstance(sample, list) else [sample, sample]
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes) or not isinstance(stages, list):
        return None
    height, width = (size * 2 ** (len(stages) - 1) for size in sizes)
    return height, width


def text_length(folder: Path) -> int:
    """Longest prompt, in tokens, that one of the tokenizers says its text encoder takes."""
    configs = [read_json(path) for path in folder.glob("tokenizer*/tokenizer_config.json")]
    lengths = [config.get("model_max_length") for config in configs]
    return max((length for length in lengths if isinstance(length, int)), default=512)


def quantization(folder: Path, backbone: str) -> str | None:
    """The method that the backbone in `folder` is quantized with, or None in full precision."""
    config = read_json(folder / backbone / "config.json").get("quantization_config")
    return None if config is None else str(config.get("quant_method", "an unknown method"))


def missing_parts(folder: Path, leave_out: frozenset[str] = frozenset()) -> list[str]:
    """The files that a pipeline folder lacks to be loaded from safetensors, as paths relative to it."""
    missing = []
    for component in components(folder):
        part = folder / component
        if component in leave_out:
            continue
        if not part.is_dir() or not any(part.iterdir()):
            missing.append(f"{component}/")
        elif (part / "config.json").is_file():
            missing += [f"{component}/{name}" for name in _missing_weights(part)]
    return missing


def variant(folder: Path, backbone: str) -> str | None:
    """The suffix, such as `fp16`, where the backbone's weights exist only under it, as partial downloads leave them."""
    names = [path.name for path in _weight_files(folder / backbone)]
    found = {match[1] if (match := _VARIANT.search(name)) else None for name in names}
    return found.pop() if len(found) == 1 else None


def check_whole(folder: Path, leave_out: frozenset[str] = frozenset()) -> None:
    """UserError, naming the file, unless `folder` is a pipeline whose weights are all there, whole and consistent."""
    pipeline_class(folder)
    missing = missing_parts(folder, leave_out)
    if missing:
        raise UserError(f"{folder} is not complete, it lacks {', '.join(missing)}")
    for component in components(folder):
        for path in sorted(_weight_files(folder / component)):
            _tensor_names(path)


def tensor_names(part: Path) -> set[str]:
    """Names of all tensors in a component's safetensors files."""
    return {name for path in _weight_files(part) for name in _tensor_names(path)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the pipeline folder is not complete") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _weight_files(part: Path) -> list[Path]:
    """A component's safetensors files; a link into the Hub's cache whose file is gone counts as none."""
    return [path for path in part.glob("*.safetensors") if path.is_file()]


def _missing_weights(part: Path) -> list[str]:
    """Weight files that a component's folder should hold and does not; one whole variant of them is enough."""
    present = {path.name for path in _weight_files(part)}
    indexes = [read_json(path).get("weight_map", {}) for path in part.glob("*.safetensors.index*.json")]
    sharded = [set(index.values()) for index in indexes]
    if any("-of-" not in name for name in present) or any(shards <= present for shards in sharded):
        return []
    if sharded:
        return sorted(min((shards - present for shards in sharded), key=len))
    if present:
        return ["*.safetensors.index.json"]
    pickled = any(path.suffix in _PICKLES for path in part.iterdir())
    return ["*.safetensors" + (" (pickled weights are there, but can run code when opened)" if pickled else "")]


def _tensor_names(path: Path) -> list[str]:
    try:
        # Opening checks the header: every tensor's dtype and shape against its byte range, and those ranges against
        # each other and the length of the file.
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`") from None
        raise UserError(f"{path} is truncated or damaged ({error}): get that file again") from None
