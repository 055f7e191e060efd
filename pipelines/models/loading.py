"""Load a pipeline from files that were checked first, on a device and in a dtype that exist."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmquant.diffusers.families import family_of
from dmquant.diffusers.quantizer import QuantMethod
from dmquant.errors import UsageError, UserError
from dmquant.host import processes
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.attention import check_attention
from dmquant.pipelines.models.checksums import checked
from dmquant.pipelines.models.dequantizing import decoded, dequantize_parts
from dmquant.pipelines.models.loras import bake
from dmquant.pipelines.models.opening import is_of_others, open_foreign
from dmquant.pipelines.models.placing import place
from dmquant.pipelines.models.registry import ModelSpec, embedded_folder, family_for
from dmquant.pipelines.models.whole import check_models, model_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_pipeline(folder: str | Path, *, verify: bool = True, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` with dmquant registered, of a whole pipeline; `options` are its own.

    Raises UserError for a Path that is no folder (a str may be a Hub id, too), for a part whose tensors are not those
    of the model that its configuration describes and, with `verify`, for a file that is not what checksums.json says:
    files are read for that while they are loaded. A folder without checksums.json is not verified.
    """
    from diffusers import DiffusionPipeline

    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    local = Path(folder) if Path(folder).is_dir() else Path(DiffusionPipeline.download(str(folder), **options))
    folders.check_whole(local, options)
    check_models(local, options, options.get("variant"))
    with checked(local, options) if verify else contextlib.nullcontext(), explained(local):
        return DiffusionPipeline.from_pretrained(str(folder), **options)


def resolve_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N` for what `--device` says; `auto` takes CUDA where there is some.

    Of several processes each takes a GPU of its own, unless one was named.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return text
    if not re.fullmatch(r"cuda(:\d+)?", text):
        raise UsageError(f"unknown device '{text}': it is auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else "finds no GPU"
        raise UserError(f"CUDA is not available (torch {torch.__version__} {build}): use --device cpu")
    everyone = processes.current()
    if text == "cuda" and everyone.count > 1:
        if everyone.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} CUDA device(s): start that many processes, "
                "or name the device that all shall use, as in --device cuda:0"
            )
        return f"cuda:{everyone.local_rank}"
    _, _, number = text.partition(":")
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(f"there is no {text}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0")
    return text


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of a name in DTYPES; UsageError for any other name, and for fp16 on the CPU."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype '{name}': it is one of {', '.join(DTYPES)}")
    if name == "fp16" and device == "cpu":
        raise UsageError("fp16 on a CPU is some ten times slower than bf16: use --dtype bf16 or fp32")
    return DTYPES[name]


def checked_folder(spec: ModelSpec, say: Callable[[str], None]) -> Path:
    """The folder with the model's files, downloaded if need be, and found whole, and in full precision if it has to be.

    `say` is told of a download before it starts. Raises UserError for weights that are missing, truncated, damaged,
    of another model than the configuration, already quantized, or not to be had.
    """
    family = family_for(spec)
    if spec.is_embedded:
        folder = embedded_folder(spec.source)
    elif Path(spec.source).is_absolute():
        folder = Path(spec.source)
    else:
        folder = hub.pipeline(spec.source, spec.download_bytes, family.without, say)
    folders.check_whole(folder, family.without)
    methods = {name: _method(folder, name) for name in family.backbones_among(folders.components(folder))}
    method = next(filter(None, methods.values()), None)
    if method is not None and not spec.dequantizes:
        raise UserError(
            f"{folder} is already quantized (by {method}): start from the full-precision model, or, with "
            "--source-quantized dequantize, from what its weights stand for; `dmquant inspect` shows what it holds"
        )
    decoded_apart = {name for name, each in methods.items() if each not in (None, QuantMethod.DMQUANT.value)}
    check_models(folder, {*family.without, *decoded_apart}, folders.variant(folder, family.component))
    return folder


def _method(folder: Path, component: str) -> str | None:
    """The method or the format that a backbone is quantized with, dmquant's or another's; None in full precision."""
    method = folders.quantization(folder, component)
    if method is None and is_of_others(folder / component):
        return open_foreign(folder / component).format.name
    return method


def checked_quantized(folder: Path, leave_out: Collection[str] = ()) -> Path:
    """The folder of a pipeline that dmquant saved, found whole but for the parts to `leave_out`; UserError if not."""
    folders.check_whole(folder, leave_out)
    check_models(folder, leave_out)
    return folder


def load_full_precision(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: str,
    say: Callable[[str], None] | None = None,
    parts: Mapping[str, Any] = MappingProxyType({}),
    *,
    offload: str | None = None,
) -> "DiffusionPipeline":
    """The model's pipeline in `dtype` on `device` (`place`), in eval mode, from safetensors only, its LoRAs fused.

    What is quantized is dequantized, if the spec says so. `parts` are in memory already and not loaded again. Raises
    UserError as `checked_folder` does, for what cannot be dequantized, and for a backbone with tensors that are not
    finite.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    folder = checked_folder(spec, say)
    family = family_for(spec)
    for name, trouble in spec.warnings.items():
        if DTYPES[name] == dtype:
            say(f"warning: {spec.name} in {name}: {trouble}")
    import diffusers

    kind = getattr(diffusers, spec.pipeline)  # DiffusionPipeline takes no parts that are optional to one of its kinds
    parameters = inspect.signature(kind.__init__).parameters
    without = {name: value for name, value in family.without.items() if name in parameters}
    variant = folders.variant(folder, family.component)
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    for name in family.backbones_among(folders.components(folder)) if spec.dequantizes else ():
        if (backbone := decoded(folder / name, dtype)) is not None:
            parts = {**parts, name: backbone}
    with explained(folder):
        apart = {
            name: model_class(*folders.classes(folder)[name]).from_pretrained(folder / name, variant=own, **options)
            for name, own in folders.other_variants(folder, variant, {**family.without, **parts}).items()
        }
        pipeline = kind.from_pretrained(folder, variant=variant, **options, **(without | apart | dict(parts)))
    if family.backbones:
        family_of(pipeline)
    if spec.dequantizes:
        dequantize_parts(pipeline, dtype)
    backbones = family.backbones_of(pipeline)
    if spec.loras and len(backbones) > 1:
        raise UserError(
            f"{spec.name} has {len(backbones)} backbones, and --lora goes into one: in Python, load_lora_weights has "
            "load_into_transformer_2=True, fuse_lora takes components, and quantize_pipeline goes on from there"
        )
    bake(pipeline, spec.loras, family.component)
    for name, backbone in backbones.items():
        _check_backbone(backbone, folder / name)
        check_attention(backbone)
    _remember_configuration(pipeline, folder, parameters)
    return place(pipeline, device, offload)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """UserError, in one line, for whatever the libraries raise while they load the pipeline in `folder`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no other kind, and diffusers and transformers any
        reason = " ".join(str(error).split())
        raise UserError(f"diffusers cannot load {folder}: {type(error).__name__}: {reason}") from error


def _check_backbone(backbone: nn.Module, part: Path) -> None:
    """UserError for a backbone that holds NaN or infinity."""
    for name, parameter in backbone.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{part} is damaged: '{name}' holds NaN or infinity in {parameter.dtype}")


def _remember_configuration(pipeline: "DiffusionPipeline", folder: Path, parameters: Iterable[str]) -> None:
    """Have the pipeline save again all that its index says: diffusers forgets the names of DiT's classes."""
    index = folders.read_json(folder / folders.INDEX)
    pipeline.register_to_config(
        **{name: index[name] for name in parameters if name in index and name not in pipeline.config}
    )
