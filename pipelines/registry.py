"""Which models there are: names from configs/models, Hub ids, local folders; and the family each belongs to.

A model is one YAML file in configs/models, which names its family (dmquant.pipelines.families).
"""

import functools
import importlib.resources
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from dmquant.errors import UserError, unknown
from dmquant.pipelines import folders, hub
from dmquant.pipelines.families import families

EMBEDDED = "embedded:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


@functools.cache
def registered_models() -> dict[str, ModelSpec]:
    """Every model of configs/models by name: the embedded ones first, then by name."""
    files = importlib.resources.files("dmquant.configs").joinpath("models").iterdir()
    specs = [ModelSpec.model_validate(yaml.safe_load(f.read_text("utf-8"))) for f in files if f.name.endswith(".yaml")]
    specs.sort(key=lambda spec: (not spec.source.startswith(EMBEDDED), spec.name))
    return {spec.name: spec for spec in specs}


def resolve_model(text: str) -> ModelSpec:
    """The model that a registered name, a local pipeline folder or a Hub id stands for.

    Raises UsageError for a name that is none of them, UserError for a folder that is no pipeline we can quantize and
    for a Hub id that is neither cached nor reachable.
    """
    models = registered_models()
    if text in models:
        return models[text]
    path = Path(text).expanduser()
    if path.exists():
        folder = path.resolve()
        return _spec_of_folder(folder, name=folder.name, source=str(folder))
    if _HUB_ID.fullmatch(text):
        for spec in models.values():
            if spec.source == text:
                return spec
        folder, download_bytes = hub.configuration(text)
        return _spec_of_folder(folder, name=text.split("/")[1], source=text, download_bytes=download_bytes)
    if "/" in text or "\\" in text:
        raise UserError(f"there is no folder {text}")
    raise unknown("model", text, models, "`dmquant models` lists them; a Hub id or a local diffusers folder works too")


def _spec_of_folder(folder: Path, *, name: str, source: str, download_bytes: int | None = None) -> ModelSpec:
    """Settings for a folder that is not registered: its own size, the rest from the nearest registered relative.

    The relative is the registered model with the same pipeline class whose size is closest, so that a copy of a
    registered model gets that model's settings.
    """
    pipeline = folders.pipeline_class(folder)
    family = next((family for family in families().values() if pipeline in family.pipelines), None)
    if family is None:
        known = ", ".join(name for family in families().values() for name in family.pipelines)
        raise UserError(f"{source} holds a {pipeline}, which no model family knows; known are {known}")
    height, width = folders.image_size(folder, family.component)
    relatives = [spec for spec in registered_models().values() if spec.pipeline == pipeline]
    relative = min(relatives, key=lambda spec: abs(spec.height - height) + abs(spec.width - width))
    call = dict(relative.call)
    if "max_sequence_length" in call:
        call["max_sequence_length"] = min(call["max_sequence_length"], folders.text_length(folder))
    return relative.model_copy(
        update={
            "name": name,
            "description": f"{pipeline} from {source}",
            "source": source,
            "height": height,
            "width": width,
            "download_bytes": download_bytes,
            "call": call,
            "license": None,
        }
    )
