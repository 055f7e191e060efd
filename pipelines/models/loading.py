"""Load a full-precision pipeline, from files that were checked first, on a device and in a dtype that exist."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from dmquant.diffusers.families import family_of
from dmquant.errors import UsageError, UserError
from dmquant.host import processes
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.attention import check_attention
from dmquant.pipelines.models.placing import place
from dmquant.pipelines.models.registry import ModelSpec, embedded_folder, family_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    """The folder with the model's files, downloaded if need be, and found whole and in full precision.

    `say` is told of a download before it starts. Raises UserError for weights that are missing, truncated, damaged,
    already quantized, or not to be had.
    """
    family = family_for(spec)
    if spec.is_embedded:
        folder = embedded_folder(spec.source)
    elif Path(spec.source).is_absolute():
        folder = Path(spec.source)
    else:
        folder = hub.pipeline(spec.source, spec.download_bytes, family.without, say)
    folders.check_whole(folder, frozenset(family.without))
    method = folders.quantization(folder, family.component)
    if method is not None:
        raise UserError(
            f"{folder} is already quantized (by {method}): start from the full-precision model; "
            "`dmquant inspect` shows what this one holds"
        )
    return folder


def load_full_precision(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: str,
    say: Callable[[str], None] | None = None,
    parts: Mapping[str, Any] = MappingProxyType({}),
    *,
    offload: bool = False,
) -> "DiffusionPipeline":
    """The model's pipeline in `dtype` on `device` (`place`), in eval mode, from safetensors only.

    `parts` are in memory already and not loaded again. Raises UserError as `checked_folder` does, and for a backbone
    with tensors that are absent or not finite.
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
    try:
        pipeline = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=folders.variant(folder, family.component),
            **(without | dict(parts)),
        )
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"diffusers cannot load {folder}: {type(error).__name__}: {reason}") from error
    if family.backbones:
        family_of(pipeline)
    _check_backbone(pipeline, folder, family.component)
    _remember_configuration(pipeline, folder, parameters)
    check_attention(getattr(pipeline, family.component))
    return place(pipeline, device, offload)


def _check_backbone(pipeline: "DiffusionPipeline", folder: Path, component: str) -> None:
    """UserError for a backbone that diffusers would leave partly at random values, or that holds NaN or infinity."""
    backbone = getattr(pipeline, component)
    absent = backbone.state_dict().keys() - folders.tensor_names(folder / component)
    if absent:
        raise UserError(f"{folder / component} lacks {len(absent)} tensor(s) of its model, '{min(absent)}' among them")
    for name, parameter in backbone.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder / component} is damaged: '{name}' holds NaN or infinity in {parameter.dtype}")


def _remember_configuration(pipeline: "DiffusionPipeline", folder: Path, parameters: Iterable[str]) -> None:
    """Have the pipeline save again all that its index says: diffusers forgets the names of DiT's classes."""
    index = folders.read_json(folder / folders.INDEX)
    pipeline.register_to_config(
        **{name: index[name] for name in parameters if name in index and name not in pipeline.config}
    )
