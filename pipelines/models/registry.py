"""The registry of models: names from configs/models, Hub ids, local folders; and the family each belongs to.

A model is one YAML file in configs/models, which names its family (dmquant.diffusers.families).
"""

import functools
import importlib.resources
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from dmquant.diffusers.families import GENERIC, HOW_TO_ADD, Family, ends, families, family_of_pipeline
from dmquant.diffusers.families.generic import COMPONENTS
from dmquant.errors import UsageError, UserError, check_choice, unknown
from dmquant.host.text import visible
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.family_files import family_in
from dmquant.pipelines.models.loras import Lora, parse
from dmquant.pipelines.models.skeleton import skeleton

EMBEDDED = "embedded:"
SOURCE_QUANTIZED = ("refuse", "dequantize")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The id of a repository on the Hub."""
FRAMES = "num_frames"  # the argument of a pipeline's call that is the number of frames
_USUAL_PIXELS = 1024  # the default of diffusers, for pipelines whose configuration tells no size
_TAKES_MORE = re.compile(
    "Control|Adapter|Img2Img|I2I|Depth2Img|Inpaint|Fill|Redux|Kontext|Pix2Pix|Edit|Refiner|Upscale|SuperResolution"
)


class ModelSpec(BaseModel):
    """A model and the settings it is run with unless told otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    source: str
    """Hub id, absolute path of a local folder, or `embedded:NAME`."""
    family: str
    pipeline: str
    """Class name of the diffusers pipeline."""
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    steps: int = Field(gt=0)
    guidance: float = Field(ge=0)
    dtype: Literal["bf16", "fp16", "fp32"]
    prompts: str
    """Name of the prompt set in configs/prompts that images are made and scored on."""
    calibration_prompts: str
    """Name of the prompt set to calibrate with; it shares no prompt with the one for images."""
    download_bytes: int | None = Field(default=None, gt=0)
    """About what the Hub sends for it; None where nothing is downloaded or the size is not known."""
    call: dict[str, Any] = {}
    """Further keyword arguments of the pipeline's call."""
    license: str | None = None
    warnings: dict[Literal["bf16", "fp16", "fp32"], str] = {}
    """Known faults of the model in a dtype."""
    component: str | None = None
    """Attribute of the pipeline that is the backbone, where the family leaves it open."""
    clip: str | None = None
    """The CLIP model that goes with its images (evaluation.networks.clip), where the usual one does not."""
    keep: dict[str, str] = {}
    """Globs of layers to keep in high precision beside the family's, and why."""
    loras: tuple[Lora, ...] = ()
    """Fused into the weights when they are loaded."""
    dequantizes: bool = False
    """Whether weights that are quantized already are taken for what they stand for."""

    @property
    def frames(self) -> int:
        """Frames of a video; 1 where it makes images."""
        return self.call.get(FRAMES, 1)

    def with_frames(self, frames: int | None) -> "ModelSpec":
        """The same with so many frames of a video."""
        return self if frames is None else self.model_copy(update={"call": {**self.call, FRAMES: frames}})

    def for_backbone(self, name: str) -> "ModelSpec":
        """The same with one of several backbones as the one that is meant."""
        return self.model_copy(update={"component": name})

    @property
    def is_embedded(self) -> bool:
        """Whether it comes with the package."""
        return self.source.startswith(EMBEDDED)


def family_for(spec: ModelSpec) -> Family:
    """The model's family, with what the model itself adds to it."""
    family = families()[spec.family]
    return replace(family, component=spec.component or family.component, keep={**family.keep, **spec.keep})


@functools.cache
def registered_models() -> dict[str, ModelSpec]:
    """Every model of configs/models by name: the embedded ones first, then by name."""
    files = importlib.resources.files("dmquant.configs").joinpath("models").iterdir()
    specs = [ModelSpec.model_validate(yaml.safe_load(f.read_text("utf-8"))) for f in files if f.name.endswith(".yaml")]
    specs.sort(key=lambda spec: (not spec.is_embedded, spec.name))
    return {spec.name: spec for spec in specs}


def embedded_folder(source: str) -> Path:
    """The folder of `embedded:NAME` in the installed package."""
    return Path(str(importlib.resources.files("dmquant.pipelines"))) / "assets" / source.removeprefix(EMBEDDED)


@functools.cache
def call_parameters(pipeline: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of the call of a diffusers pipeline class by name; UserError where diffusers has no such class."""
    return inspect.signature(pipeline_class(pipeline).__call__).parameters


def pipeline_parts(pipeline: str) -> list[str]:
    """Names of the parts of a diffusers pipeline class by name; UserError where diffusers has no such class."""
    parameters = inspect.signature(pipeline_class(pipeline).__init__).parameters.values()
    return [one.name for one in parameters if one.default in (one.empty, None) and one.name != "self"]


def pipeline_class(name: str) -> type:
    """The class of a diffusers pipeline by name; UserError where diffusers has none of that name."""
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {name}")
    return found


def resolve_model(text: str, family: str | None = None) -> ModelSpec:
    """The model that a registered name, a local pipeline folder or a Hub id stands for.

    `family` overrules what its pipeline class says; `generic` fits any backbone, and a Python file defines one. Raises
    UsageError for a name that is none of them and for a family that does not fit, UserError for a folder that is no
    pipeline we can quantize and for a Hub id that is neither cached nor reachable.
    """
    if family is not None and family.endswith(".py"):
        family = family_in(Path(os.path.expanduser(family)))
    if family is not None and family not in families():
        raise unknown("family", family, families(), f"it is one of {', '.join(families())}")
    models = registered_models()
    if text in models:
        return _registered(models[text], family)
    path = Path(os.path.expanduser(text))  # unlike Path.expanduser, without an error for a home that nobody has
    if os.path.exists(path):
        folder = path.resolve()
        return _spec_of_folder(folder, family, name=visible(folder.name) or "model", source=str(folder))
    if HUB_ID.fullmatch(text):
        for spec in models.values():
            if spec.source == text:
                return _registered(spec, family)
        folder, download_bytes = hub.configuration(text)
        return _spec_of_folder(folder, family, name=text.split("/")[1], source=text, download_bytes=download_bytes)
    if "/" in text or "\\" in text:
        raise UserError(f"there is no folder {text}")
    raise unknown("model", text, models, "`dmquant models` lists them; a Hub id or a local diffusers folder works too")


def with_loras(spec: ModelSpec, given: Iterable[str]) -> ModelSpec:
    """The model with the LoRAs of `--lora`, which its name tells too.

    Raises as `loras.parse` does, and UsageError for one that is given twice.
    """
    loras = tuple(map(parse, given))
    for lora in loras:
        if sum(other.path == lora.path for other in loras) > 1:
            raise UsageError(f"--lora {lora.path} is given twice: give it once, with the sum of the scales")
    name = "+".join((spec.name, *(lora.name for lora in loras)))
    return spec.model_copy(update={"name": name, "loras": loras}) if loras else spec


def as_source(spec: ModelSpec, loras: Iterable[str], quantized: str) -> ModelSpec:
    """The model as the commands' options of the source want it: LoRAs fused, and one that is `quantized` already
    refused or dequantized. Raises as `with_loras` does, and UsageError for another word."""
    dequantizes = check_choice("--source-quantized", quantized, SOURCE_QUANTIZED) == "dequantize"
    return with_loras(spec, loras).model_copy(update={"dequantizes": dequantizes})


def _registered(spec: ModelSpec, family: str | None) -> ModelSpec:
    """A registered model, taken for one of `family` if that is given."""
    if family in (None, spec.family):
        return spec
    folder = embedded_folder(spec.source) if spec.is_embedded else hub.configuration(spec.source)[0]
    return _of_family(spec, folder, family)


def _spec_of_folder(
    folder: Path, family: str | None, *, name: str, source: str, download_bytes: int | None = None
) -> ModelSpec:
    """Settings for a folder that is not registered: its own size, the rest from its nearest relative."""
    pipeline = folders.pipeline_class(folder)
    own = family_of_pipeline(pipeline)
    known = own.name if own is not None and pipeline in (*own.pipelines, *own.edits) else None
    if known is None:
        _check_takes_a_prompt_alone(folder, pipeline, source)
    chosen = family or known
    if chosen is None:
        raise _unknown_pipeline(pipeline, source)
    size = folders.image_size(folder, backbone_part(folder))
    relative = _relative(pipeline, name, size) or _defaults(pipeline, chosen)
    height, width = size or (relative.height, relative.width)
    call = dict(relative.call)
    if "max_sequence_length" in call:
        call["max_sequence_length"] = min(call["max_sequence_length"], folders.text_length(folder))
    spec = relative.model_copy(
        update={
            "name": name,
            "description": f"{pipeline} from {source}",
            "source": source,
            "height": height,
            "width": width,
            "download_bytes": download_bytes,
            "call": call,
            "clip": None,  # the relative's network knows its own pictures
            "license": None,
        }
    )
    return spec if chosen == known else _of_family(spec, folder, chosen)


def _relative(pipeline: str, name: str, size: tuple[int, int] | None) -> ModelSpec | None:
    """The registered model with that pipeline class whose settings a folder takes; None where there is none.

    It is the one whose repository is called the same, else the one of the closest size, so that a copy of a registered
    model gets that model's settings.
    """

    def distance(spec: ModelSpec) -> tuple[bool, int]:
        pixels = abs(spec.height - size[0]) + abs(spec.width - size[1]) if size else 0
        return spec.source.rpartition("/")[2] != name, pixels

    relatives = [spec for spec in registered_models().values() if spec.pipeline == pipeline]
    return min(relatives, key=distance, default=None)


def _defaults(pipeline: str, family: str) -> ModelSpec:
    """Settings of a pipeline class as its own call has them."""
    parameters = call_parameters(pipeline)

    def default(name: str, otherwise: float) -> float:
        value = parameters[name].default if name in parameters else None
        return value if isinstance(value, int | float) else otherwise

    return ModelSpec(
        name=pipeline,
        description=pipeline,
        source=pipeline,
        family=family,
        pipeline=pipeline,
        height=_USUAL_PIXELS,
        width=_USUAL_PIXELS,
        steps=default("num_inference_steps", 50),
        guidance=default("guidance_scale", 0.0),
        dtype="bf16",
        prompts="default",
        calibration_prompts="default-calibration",
    )


def _of_family(spec: ModelSpec, folder: Path, name: str) -> ModelSpec:
    """`spec` with the backbone in `folder` taken for one of the family `name`; UsageError where it is none."""
    if name == GENERIC:
        component = backbone_part(folder)
        keep = ends(skeleton(folder / component))
        return spec.model_copy(update={"family": name, "component": component, "keep": keep})
    family = families()[name]
    config = folder / family.component / "config.json"
    backbone = folders.read_json(config).get("_class_name") if config.is_file() else f"no {family.component}"
    if backbone not in family.backbones:
        known = ", ".join(family.backbones)
        raise UsageError(
            f"--family {name} knows {known}, but {spec.source} has {backbone}; --family {GENERIC} fits any"
        )
    return spec.model_copy(update={"family": name})


def backbone_part(folder: Path) -> str:
    """Name of the part of an unknown pipeline that is its backbone."""
    parts = folders.components(folder)
    for name in COMPONENTS:
        if name in parts:
            return name
    raise UserError(f"{folder} has no {' or '.join(COMPONENTS)}, but {', '.join(parts)}: `dmquant.quantize_` in Python "
                    "quantizes any of them without data")  # fmt: skip


def _check_takes_a_prompt_alone(folder: Path, pipeline: str, source: str) -> None:
    """UserError for a pipeline class that makes something else than images, or needs more than a prompt for them."""
    parameters = call_parameters(pipeline)
    if FRAMES in parameters or "Video" in pipeline:
        raise UserError(f"{source} holds a {pipeline}, which makes videos: dmquant quantizes text-to-image pipelines")
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    alone = {"self", "prompt", "args", "kwargs"}
    if "prompt" not in parameters or not alone.issuperset(needed) or _TAKES_MORE.search(pipeline):
        component = next((name for name in COMPONENTS if name in folders.components(folder)), COMPONENTS[0])
        raise UserError(
            f"{source} holds a {pipeline}, which takes more than a prompt: quantize the text-to-image pipeline of the "
            f"same model and hand its {component} over, as in "
            f"`{pipeline}.from_pretrained(..., {component}=quantized.{component})`"
        )


def _unknown_pipeline(pipeline: str, source: str) -> UserError:
    known = ", ".join(
        f"{family.name} ({', '.join(family.pipelines)})" for family in families().values() if family.pipelines
    )
    return UserError(
        f"{source} holds a {pipeline}, which no model family knows; known are {known}; `dmquant draft-family "
        f"{source} --out my_family.py` drafts one for --family my_family.py ({HOW_TO_ADD}), and --family {GENERIC} "
        "--recipe rtn quantizes any Linear and Conv2d without calibration"
    )
