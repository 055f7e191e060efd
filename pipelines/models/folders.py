"""Diffusers pipeline folders on disk: what they hold, and whether it is whole. Reads no weights."""

from collections.abc import Collection
from pathlib import Path

from dmquant.diffusers.bounds import numbers
from dmquant.errors import UserError
from dmquant.host import weight_file
from dmquant.host.json_file import read_object as read_json
from dmquant.pipelines.models import weights

INDEX = "model_index.json"
LARGEST_TOKENIZER = 1 << 28  # bytes: eight times Gemma's
SCHEDULER, MOST_TIMESTEPS = "scheduler_config.json", 1_000_000
LARGEST_SIDE = 16_384  # pixels: four times what any pipeline is made for
READ = {".json", ".safetensors", ".model", ".txt", ".vocab", ".spm", ".tiktoken", ".jinja"}
"""Suffixes of what diffusers and transformers read of a part: configuration, weights, tokenizers."""


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
    return list(classes(folder))


def classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of each part that comes from files, by the part's name, which is its folder's."""
    entries = read_json(folder / INDEX).items()
    listed = {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    found = {name: (library, kind) for name, (library, kind) in listed.items() if library is not None}
    for name, entry in found.items():
        if Path(name).name != name or name.startswith(".") or not all(isinstance(each, str) for each in entry):
            raise UserError(f"{folder / INDEX} lists '{name}', which is no part of a pipeline: get that file again")
    return found


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
    height, width = (size << min(len(stages) - 1, 32) for size in sizes)
    if not 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise UserError(
            f"{folder} makes images of {height}x{width} pixels by its configurations, and 1 to {LARGEST_SIDE} a side "
            "are possible: get its config.json files again"
        )
    return height, width


def text_length(folder: Path) -> int:
    """Longest prompt, in tokens, that one of the tokenizers says its text encoder takes."""
    configs = [read_json(path) for path in folder.glob("tokenizer*/tokenizer_config.json")]
    lengths = [config.get("model_max_length") for config in configs]
    return max((length for length in lengths if isinstance(length, int) and length > 0), default=512)


def quantization(folder: Path, backbone: str) -> str | None:
    """The method that the backbone in `folder` is quantized with, or None in full precision."""
    config = read_json(folder / backbone / "config.json").get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, dict):
        raise UserError(f"{folder / backbone / 'config.json'} holds a quantization_config that is none: get it again")
    return str(config.get("quant_method", "an unknown method"))


def missing_parts(folder: Path, leave_out: Collection[str] = ()) -> list[str]:
    """The files that a pipeline folder lacks to be loaded from safetensors, as paths relative to it."""
    missing = []
    for component in components(folder):
        part = folder / component
        if component in leave_out:
            continue
        if not part.is_dir() or not any(part.iterdir()):
            missing.append(f"{component}/")
        elif (part / "config.json").is_file():
            missing += [f"{component}/{name}" for name in weights.missing_files(part)]
    return missing


def variant(folder: Path, backbone: str) -> str | None:
    """The suffix, such as `fp16`, where the backbone's weights exist only under it, as partial downloads leave them."""
    found = weights.variants(folder / backbone)
    return found.pop() if len(found) == 1 else None


def other_variants(folder: Path, variant: str | None, leave_out: Collection[str] = ()) -> dict[str, str]:
    """The parts whose weights are there neither as `variant` nor plain, and a variant that they are there as."""
    found = {name: weights.variants(folder / name) for name in components(folder) if name not in leave_out}
    return {name: min(present) for name, present in found.items() if present and not present & {variant, None}}


def check_whole(folder: Path, leave_out: Collection[str] = ()) -> None:
    """UserError, naming the file, unless `folder` is a pipeline whose files are all there, whole and to be read.

    Configurations are read, and the headers of weights. What is no regular file is not opened.
    """
    try:
        pipeline_class(folder)
        missing = missing_parts(folder, leave_out)
        if missing:
            raise UserError(f"{folder} is not complete, it lacks {', '.join(missing)}")
        for component in components(folder):
            if component not in leave_out:
                _check_files(folder / component)
    except OSError as error:  # it is not ours to read, or is being removed
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def _check_files(part: Path) -> None:
    for path in sorted(path for path in part.iterdir() if path.suffix in READ and path.exists()):
        if path.suffix == ".safetensors":
            weight_file.header(path)
        elif path.name == SCHEDULER:
            _check_scheduler(path)
        elif path.name.endswith("config.json"):
            read_json(path)
        else:
            weight_file.check_regular(path)
            if (size := path.stat().st_size) > LARGEST_TOKENIZER:
                raise UserError(f"{path} has {size / 1e6:.0f} MB, more than any tokenizer: get that file again")


def _check_scheduler(path: Path) -> None:
    """UserError for a scheduler without the name of its class, where diffusers takes defaults, or of huge tables."""
    config = read_json(path)
    if "_class_name" not in config:
        raise UserError(f"{path} names no scheduler: get that file again")
    name, number = max(numbers(config), key=lambda item: abs(item[1]), default=("", 0))
    if abs(number) > MOST_TIMESTEPS:
        raise UserError(f"{path} says {name}: {number}, more than any scheduler has timesteps: get that file again")
