"""LoRAs that are fused into a full-precision pipeline before anything is done with it: files or folders, and scales."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from dmquant.errors import UsageError, UserError
from dmquant.host import weight_file
from dmquant.host.hashes import sha256_once
from dmquant.host.text import visible

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OF_PEFT, OF_DIFFUSERS = ("adapter_config.json", "adapter_model.safetensors"), "pytorch_lora_weights.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MARKS = re.compile(r"lora|hada_|lokr_|dora_|diff_b|\.alpha$|ia3_", re.IGNORECASE)  # in names of tensors of adapters
_SIZE = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)")
_ONE_SIDED = re.compile(r"keys found in the model: ([\w.\-]*\w)")


class Lora(BaseModel):
    """A LoRA by its absolute path: a safetensors file, or the folder of an adapter that peft saved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    scale: float = 1.0

    @property
    def file(self) -> Path:
        """The file of its weights."""
        return self.path / OF_PEFT[1] if self.path.is_dir() else self.path

    @property
    def name(self) -> str:
        """What it is called: by its folder where its file has the name that every such file has."""
        named = self.path if self.path.is_dir() or self.path.name != OF_DIFFUSERS else self.path.parent
        return visible(named.stem if named.suffix == ".safetensors" else named.name)

    @property
    def key(self) -> str:
        """The name of its entry among the hashes of a pipeline's files."""
        return f"LoRA {self.name} at {self.scale:g}"

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return sha256_once(self.file)

    @property
    def license(self) -> str | None:
        """What the file's metadata or the README beside it says."""
        with safe_open(self.file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return metadata.get("license") or metadata.get("modelspec.license") or _license_of_card(self.file.parent)

    def describe(self) -> str:
        """A line for people: name, scale, licence and hash."""
        return f"{self.name} at {self.scale:g} (license: {self.license or 'not given'}; SHA-256 {self.sha256})"


def parse(text: str) -> Lora:
    """The LoRA that `--lora` FILE[:SCALE] means. UsageError for a scale that is no number, UserError for a file that is
    missing, in another format, or no LoRA."""
    place, separator, scale = text.rpartition(":")
    if not separator or Path(text).exists():
        place, scale = text, "1"
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UsageError(f"--lora {text}: the scale '{scale}' is no number: write FILE:SCALE, as style.safetensors:0.8")
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"--lora {text}: there is no {path}")
    lora = Lora(path=_found_in(path).resolve(), scale=factor)
    names = weight_file.header(lora.file)
    if not any(map(_MARKS.search, names)):
        first = f"its first tensor is {next(iter(names))}" if names else "it holds no tensors"
        raise UserError(f"{path} is no LoRA: {first}")
    return lora


def _found_in(path: Path) -> Path:
    """A LoRA's file, or the folder of an adapter of peft; UserError where a folder holds none or several."""
    if path.suffix in PICKLED:
        raise UserError(f"{path} is a pickle, which may run code: give it as safetensors")
    if not path.is_dir() or all((path / name).is_file() for name in OF_PEFT):
        return path
    files = [path / OF_DIFFUSERS] if (path / OF_DIFFUSERS).is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        pickled = any(one.suffix in PICKLED for one in path.iterdir())
        found = f"{len(files)} safetensors files: name one of them" if files else "no safetensors file"
        raise UserError(f"{path} holds {found}{'; pickles may run code and are not read' if pickled else ''}")
    return files[0]


def bake(pipeline: "DiffusionPipeline", loras: Iterable[Lora], component: str) -> None:
    """Fuse LoRAs into the weights of a full-precision pipeline, in its dtype; nothing of them is left beside these.

    What peft saved goes into the backbone, the `component`; files go where diffusers loads them, text encoders too.
    UserError for one that does not fit, naming the first tensor that does not.
    """
    for lora in loras:
        with _in_one_line(lora, pipeline):
            if lora.path.is_dir():
                _bake_by_peft(getattr(pipeline, component), lora)
            else:
                _bake_by_diffusers(pipeline, lora)


def _bake_by_diffusers(pipeline: Any, lora: Lora) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(
            f"diffusers loads no LoRA file into a {type(pipeline).__name__}: give the folder of one that peft saved"
        )
    place, name = lora.path.parent, lora.path.name
    pipeline.load_lora_weights(place, weight_name=name, adapter_name="baked", local_files_only=True)
    if not any(pipeline.get_list_adapters().values()):
        raise UserError(f"no tensor of {lora.name} is for a part of a {type(pipeline).__name__}")
    pipeline.set_adapters(["baked"], [lora.scale])
    pipeline.fuse_lora(safe_fusing=True)
    pipeline.unload_lora_weights()


def _bake_by_peft(backbone: Any, lora: Lora) -> None:
    import peft

    adapted = peft.PeftModel.from_pretrained(backbone, lora.path, local_files_only=True)
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.scale_layer(lora.scale)
    adapted.merge_and_unload(safe_merge=True)
    vars(backbone).pop("peft_config", None)


@contextlib.contextmanager
def _in_one_line(lora: Lora, pipeline: Any) -> Iterator[None]:
    """UserError for whatever diffusers and peft raise, or only warn of, about tensors that do not fit."""
    left_out, logger = _LeftOut(), logging.getLogger("diffusers.utils.peft_utils")
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.WARNING)
    logger.addHandler(left_out)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            yield
    except UserError:
        raise
    except Exception as error:  # of any kind, ValueError and RuntimeError most
        raise UserError(f"{lora.path} does not fit this {type(pipeline).__name__}: {_first_fault(error)}") from error
    finally:
        logger.removeHandler(left_out)
        logger.propagate = True
        logger.setLevel(level)
    if left_out.name:
        raise UserError(f"{lora.path} does not fit this {type(pipeline).__name__}: it has {left_out.name} otherwise")


class _LeftOut(logging.Handler):
    """The first tensor that diffusers warns to have found in only one of the file and the model."""

    name: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.name is None and (found := _ONE_SIDED.search(record.getMessage())):
            self.name = found.group(1)


def _first_fault(error: Exception) -> str:
    text = " ".join(str(error).split())
    if found := _SIZE.search(text):
        name, of_file, of_model = found.groups()
        return f"{name} is ({of_file}) in the file and ({of_model}) here"
    return f"{text[:200]}{'...' if len(text) > 200 else ''}"


def _license_of_card(folder: Path) -> str | None:
    """The license that the front matter of a README names."""
    try:
        front = (folder / "README.md").read_text("utf-8").split("---", 2)[1]
        named = yaml.safe_load(front)["license"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return named if isinstance(named, str) else None
