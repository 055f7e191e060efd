"""From what was typed to what a run needs: every name looked up and every value checked before any work begins."""

import importlib.metadata
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import dmquant
from dmquant.calib.blocks.codes import meaning_of
from dmquant.diffusers.families import Family
from dmquant.errors import UsageError
from dmquant.evaluation.generate import ImageRequest, batch_size_for, image_requests
from dmquant.evaluation.images import any_images
from dmquant.evaluation.metrics.registry import METRICS, all_names, check_names, default_names, needing
from dmquant.evaluation.networks import CLIP
from dmquant.host.files import fingerprint
from dmquant.host.names import readable
from dmquant.models import completed
from dmquant.pipelines.models.loading import resolve_device, resolve_dtype
from dmquant.pipelines.models.placing import check_offload
from dmquant.pipelines.models.registry import (
    EMBEDDED,
    ModelSpec,
    as_source,
    call_parameters,
    embedded_folder,
    family_for,
    resolve_model,
)
from dmquant.pipelines.prompts.lists import PromptSet, read_prompts
from dmquant.pipelines.runs.bounds import check_environment, check_image_size, check_numbers, check_taken, parse_size
from dmquant.pipelines.runs.defaults import named_recipe
from dmquant.pipelines.runs.file_recipe import FILE, FileRecipe, chosen_recipe
from dmquant.pipelines.runs.inputs import Inputs, resolve_inputs
from dmquant.pipelines.runs.typed import Options
from dmquant.recipe import Recipe
from dmquant.settings import format_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_PROMPTS = 64
ALL = "all"
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a run depends on, except the weights themselves.

    `calibration_prompts` is the whole list, of which the recipe takes as many as it asks for; `calibration_data` a
    folder with calibration data to use or to create; `memory_budget` bytes, None for what calibration needs. Images
    without their final latents are made again where `needs_latents`. `clip` is the CLIP model of the metrics,
    `prompt_set` says for people which prompts these are,
    and `command` what was typed. `inputs` are images that go with the prompts, where any do.
    """

    model: ModelSpec
    recipe: Recipe | FileRecipe
    calibration_prompts: tuple[str, ...]
    calibration_data: Path | None
    memory_budget: int | None
    prompts: tuple[str, ...]
    prompt_set: str
    steps: int
    guidance: float
    height: int
    width: int
    seed: int
    batch_size: int
    deterministic: bool
    metrics: tuple[str, ...]
    needs_latents: bool
    real: Path | None
    clip: str
    device: str
    offload: str | None
    dtype_name: str
    folder_name: str
    command: str
    inputs: Inputs | None = None

    @property
    def family(self) -> Family:
        return family_for(self.model)

    def for_backbone(self, name: str) -> "Settings":
        """The same where the backbone is one of several that a pipeline has."""
        return self if name == self.family.component else replace(self, model=self.model.for_backbone(name))

    @property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.dtype_name, self.device)

    @property
    def formats(self) -> tuple[str, str]:
        """Full names of the formats of weights and activations."""
        if isinstance(self.recipe, FileRecipe):
            return self.recipe.weights, self.recipe.activations
        return format_name(self.recipe.weights), format_name(self.recipe.activations)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that all images share, as far as it takes them."""
        sampling = {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            self.family.guidance_argument: self.guidance,
        }
        if self.inputs is None:
            taken, own = call_parameters(self.model.pipeline), self.model.call
        else:
            taken = call_parameters(self.inputs.pipeline)
            own = {name: value for name, value in self.model.call.items() if name in taken} | self.inputs.call
        return {name: value for name, value in sampling.items() if name in taken} | own

    @property
    def calibration_call(self) -> dict[str, Any]:
        """The same for calibration, with the images that go with its prompts."""
        return self.call | dict(self.inputs.of_calibration if self.inputs else {})

    @property
    def called_in(self) -> dict[str, Any]:
        """What is called where there are images, as JSON can hold it; nothing else than the model's own where not."""
        return self.inputs.key if self.inputs else {}

    def prompted(self, pipeline: "DiffusionPipeline") -> Any:
        """The pipeline of the model as something that is called with prompts, and with images where there are any."""
        prompted = self.family.prompted(pipeline)
        return prompted if self.inputs is None else self.inputs.taken_by(prompted, self.dtype, self.device)

    def requests(self, weights: str) -> list[ImageRequest]:
        """The images to make with the weights that the fingerprint `weights` stands for."""
        way = {"deterministic": True} if self.deterministic else {}  # without it the key is that of earlier versions
        way |= {"inputs": self.called_in} if self.inputs else {}
        way["device"] = self.device.partition(":")[0]
        settings = fingerprint(weights=weights, call=self.call, dtype=self.dtype_name, **way)
        given = self.inputs.of_each_prompt() if self.inputs else ()
        return image_requests(self.prompts, self.seed, settings, self.needs_latents, given)

    def recipe_for(self, backbone: nn.Module) -> Recipe:
        """The recipe with all rules written out for a backbone of the family, whatever its class is called."""
        return completed(self.recipe, backbone, self.family.known(backbone))

    def model_key(self, weights: str) -> str:
        """Fingerprint of all that the quantized model computes with, `weights` being that of the full-precision ones.

        The memory budget is not part of it: it decides where data lies, not what is computed from it.
        """
        if isinstance(self.recipe, FileRecipe):
            files, version = self.recipe.hashes, dmquant.__version__
            return fingerprint(source=weights, files=files, dtype=self.dtype_name, dmquant=version)
        data = {"calibration_prompts": self.calibration_prompts, "call": self.call} if self.recipe.calibrated else {}
        if data and self.inputs:
            data["inputs"] = [self.called_in, self.inputs.calibration_key]
        family = {"keep": sorted(self.family.keep)} if self.recipe.keep == "family" else {}
        return fingerprint(
            source=weights,
            recipe=meaning_of(self.recipe),
            dtype=self.dtype_name,
            dmquant=dmquant.__version__,
            **family,
            **data,
        )

    def saved_model_key(self, weights: str) -> str:
        """Fingerprint of all that the files of the quantized model depend on; they tell the recipe's name, too."""
        named = {"name": self.recipe.name, "description": self.recipe.description}
        return fingerprint(model=self.model_key(weights), **named)

    def to_dict(self, source_hashes: dict[str, str], recipes: dict[str, Any]) -> dict[str, Any]:
        """The content of run.yaml; `recipes` is its part on the quantization of the model."""
        return {
            "model": {
                "name": self.model.name,
                "source": self.model.source,
                "family": self.model.family,
                "pipeline": self.model.pipeline,
                "sha256": source_hashes,
                "loras": [lora.describe() for lora in self.model.loras],
                "source_quantized": "dequantize" if self.model.dequantizes else "refuse",
            },
            **recipes,
            "calibration": {
                "data": None if self.calibration_data is None else str(self.calibration_data),
                "memory_budget": self.memory_budget,
                "prompts_sha256": fingerprint(prompts=self.calibration_prompts),
                "prompts": list(self.calibration_prompts),
            },
            "images": {
                "seed": self.seed,
                "count": len(self.prompts),
                "batch_size": self.batch_size,
                "deterministic": self.deterministic,
                "height": self.height,
                "width": self.width,
                **self.call,
            },
            **({"inputs": self.inputs.describe()} if self.inputs else {}),
            "metrics": list(self.metrics),
            "real": None if self.real is None else str(self.real),
            "clip": self.clip,
            "device": self.device,
            "offload": self.offload,
            "dtype": self.dtype_name,
            "command": self.command,
            "versions": versions(),
            "prompt_set": self.prompt_set,
            "prompts_sha256": fingerprint(prompts=self.prompts),
            "prompts": list(self.prompts),
        }


def resolve(options: Options) -> Settings:
    """Look up and check everything that was typed; reads no weights and writes nothing.

    Raises UsageError for unknown names and impossible values, UserError for what this machine does not have.
    """
    check_numbers(options)
    model = as_source(resolve_model(options.model, options.family), options.loras or (), options.source_quantized)
    named = named_recipe(options.recipe, options.purpose)
    recipe = chosen_recipe(model, named, options.w, options.a, options.components)
    metrics = resolve_metrics(options.metrics, options.real, own_clip=model.clip is not None)
    if options.clip and set(metrics) & set(needing("clip")):
        _check_clip(options.clip)
    device = resolve_device(options.device)
    check_offload(options.offload, device)
    check_environment()
    dtype_name = options.dtype or model.dtype
    resolve_dtype(dtype_name, device)
    check_taken(options, model)
    prompts = _prompts(options, model)
    height, width = options.height or model.height, options.width or model.width
    check_image_size(height, width)
    calibration = read_prompts(options.calibration_prompts or model.calibration_prompts)
    steps = options.steps or model.steps
    inputs = resolve_inputs(options, model, prompts, calibration, (width, height), steps)
    alone = inputs is not None and inputs.pipeline in family_for(model).edits
    return Settings(
        model=model.with_frames(options.frames),
        recipe=recipe,
        calibration_prompts=calibration.prompts,
        calibration_data=options.calibration_data,
        memory_budget=None if options.memory_budget is None else parse_size(options.memory_budget, "--memory-budget"),
        prompts=prompts.prompts,
        prompt_set=prompts.describe(),
        steps=steps,
        guidance=model.guidance if options.guidance is None else options.guidance,
        height=height,
        width=width,
        seed=options.seed,
        batch_size=1 if alone else options.batch_size or batch_size_for(height, width, options.frames or model.frames),
        deterministic=options.deterministic,
        metrics=metrics,
        # Images of an earlier version have none: a default does not throw away images that took hours.
        needs_latents=options.metrics is not None and any("latents" in METRICS[name].needs for name in metrics),
        real=options.real,
        clip=clip_source(options.clip or model.clip),
        device=device,
        offload=options.offload,
        dtype_name=dtype_name,
        command=options.command,
        inputs=inputs,
        folder_name=readable("-".join(filter(None, (model.name, recipe.name, options.w, options.a)))),
    )


def resolve_all(options: Options, recipes: str) -> dict[str, Settings]:
    """Settings for each of several recipes by name, which differ in the recipe only.

    `recipes` is a comma-separated list of RECIPE[:WEIGHTS[:ACTIVATIONS]], or file:PATH for what others quantized;
    formats that a recipe does not give are the options'. Raises as `resolve` does, and UsageError for an empty list or
    two recipes of one name.
    """
    entries = [entry.strip() for entry in recipes.split(",") if entry.strip()]
    if not entries:
        raise UsageError("--recipes is empty: name at least one, such as rtn")
    first = next((entry.partition(":")[0] for entry in entries if not entry.startswith(FILE)), "rtn")
    base = resolve(replace(options, recipe=first))
    settings: dict[str, Settings] = {}
    for entry in dict.fromkeys(entries):
        source, *formats = [entry] if entry.startswith(FILE) else entry.split(":")
        if len(formats) > 2:
            raise UsageError(f"'{entry}' in --recipes has more than RECIPE:WEIGHTS:ACTIVATIONS")
        given = [name or None for name in (*formats, "", "")[:2]]
        asked = (None, None) if source.startswith(FILE) else (given[0] or options.w, given[1] or options.a)
        recipe = chosen_recipe(base.model, source, *asked, None if source.startswith(FILE) else options.components)
        name = "-".join([recipe.name, *filter(None, given)])
        if name in settings:
            remedy = "another name" if source.startswith(FILE) else "another name in its file"
            raise UsageError(f"two of the recipes are called '{name}': give one {remedy}")
        settings[name] = replace(base, recipe=recipe.with_settings(name=name))
    return settings


def with_recipe(settings: Settings, source: str, w: str | None, a: str | None) -> Settings:
    """The same with another recipe in these formats or its own, called RECIPE-W-A; raises as `resolve` does."""
    recipe = chosen_recipe(settings.model, source, w, a)
    return replace(settings, recipe=recipe.with_settings(name="-".join(filter(None, (recipe.name, w, a)))))


def resolve_metrics(listed: str | None, real: Path | None, own_clip: bool = False) -> tuple[str, ...]:
    """Names of the metrics to compute, from a comma-separated list; also checks that `real` holds images.

    `all` stands for all of them. By default nothing is taken that may have to be downloaded, so a CLIP score only where
    the model comes with a CLIP model.
    """
    if real is not None:
        any_images(real)
    if listed is None:
        return default_names(real is not None, own_clip)
    if listed.strip() == ALL:
        return all_names(real is not None)
    names = tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    if not names:
        raise UsageError("--metrics is empty: name at least one, such as psnr")
    check_names(names)
    return names


def clip_source(name: str | None) -> str:
    """The source of a name for `networks.clip`: the folder of an embedded model; without a name the usual model."""
    if name is None:
        return CLIP
    return str(embedded_folder(name)) if name.startswith(EMBEDDED) else name


def _check_clip(name: str) -> None:
    """UsageError for a CLIP model that nobody knows, before the hours that pass until it is needed."""
    from dmquant.evaluation.networks.clip import find  # brings open_clip

    find(clip_source(name))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    own = {"dmquant": dmquant.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def _prompts(options: Options, model: ModelSpec) -> PromptSet:
    """As many prompts of the list as were asked for; by default 64, or all where there are no more."""
    listed = read_prompts(options.prompts or model.prompts)
    return listed.take(options.num_prompts or min(DEFAULT_PROMPTS, listed.total), options.prompt_seed)
