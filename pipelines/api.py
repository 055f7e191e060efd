"""The Python interface to a pipeline that is already loaded: quantize its backbone in place."""

import contextlib
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from dmquant.convert import LayerReport, component_names, of_backbone, quantize_layers_, unmatched
from dmquant.diffusers.arguments import EMBEDDED, PICTURES
from dmquant.diffusers.families import Family, family_of
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.errors import UsageError, UserError, check_choice, unknown
from dmquant.evaluation.generate import batch_size_for
from dmquant.host import owned
from dmquant.host.console import Console
from dmquant.layers import QUANTIZED
from dmquant.models import completed
from dmquant.pipelines.models.attention import check_attention
from dmquant.pipelines.models.loading import DTYPES, resolve_device
from dmquant.pipelines.models.placing import OFFLOADS, end_offloading, place
from dmquant.pipelines.models.registry import FRAMES, registered_models
from dmquant.pipelines.models.saving import model_card, save_whole
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.bounds import parse_size
from dmquant.pipelines.runs.calibration import calibrate_all, weights_key
from dmquant.pipelines.runs.components import check_components, check_names, quantize_components, with_components
from dmquant.pipelines.runs.defaults import DEFAULT_RECIPE
from dmquant.pipelines.runs.footprint import Footprint, footprint
from dmquant.recipe import Recipe
from dmquant.settings import format_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STEPS, SCHEDULES = "num_inference_steps", ("timesteps", "sigmas")
REFUSED = {
    "prompt": "prompts to calibrate with are its `calibration`",
    "generator": "calibration draws noise of its own, the same every time; leave it out",
    "skip_guidance_layers": "calls without some layers are no calibration data; leave it out and give it afterwards",
}
WITHOUT_EFFECT = ("output_type", "return_dict")  # on what the backbone is given
DEFAULT_PROMPTS = "default-calibration"


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize_pipeline`: the recipe with every choice filled in, the layers, the bytes.

    `components` has, by name, what `quantize_components` says of the other parts that were quantized.
    """

    recipe: Recipe
    layers: list[LayerReport]
    footprint: Footprint
    components: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Calibration:
    """The settings of a run that `calibrate` reads."""

    family: Family
    recipe: Recipe
    calibration_prompts: Sequence[str] | None
    memory_budget: int | None
    batch_size: int
    calibration_call: dict[str, Any]
    dtype_name: str
    calibration_data: Path | None = None
    device: str = ""
    offload: str | None = None
    called_in: dict[str, Any] = field(default_factory=dict)

    def prompted(self, pipeline: "DiffusionPipeline") -> Any:
        """The pipeline as something that is called with prompts."""
        return self.family.prompted(pipeline)


class _LoggingConsole(Console):
    """A library prints nothing: lines go to the logger `dmquant`; bars still show on a terminal."""

    def say(self, line: str) -> None:
        logging.getLogger("dmquant").info(line)


def quantize_pipeline(
    pipe: "DiffusionPipeline",
    recipe: Recipe | str | Path = DEFAULT_RECIPE,
    *,
    w: str | None = None,
    a: str | None = None,
    components: Mapping[str, str] = MappingProxyType({}),
    calibration: Sequence[str] | str | None = None,
    memory_budget: str | None = None,
    offload: str | None = None,
    device: str = "cuda",
    out: str | Path | None = None,
    **call: Any,
) -> Quantized:
    """Quantize the backbone of a loaded full-precision pipeline in place, and those of its other parts that are named.

    A recipe that takes data (`Recipe.calibrated`) runs the pipeline as it is called with `call`. Stopped on the way, it
    leaves the backbone partly quantized.

    Args:
        pipe: a text-to-image pipeline whose backbone has a model family, or one of its family that takes images as well
            (img2img, inpainting, editing, ControlNet), on its device, in its dtype.
        recipe: a Recipe, or a name, bits (`w4a6`) or YAML file, with `w` and `a` as its formats.
        components: recipes without data, by name, bits or file, for other parts: `{"text_encoder": "w8a16"}`. Rules of
            the recipe with a `component` name parts as well.
        calibration: prompts, the name of a prompt set or a file of prompts; by default the set of the registered model
            that is nearest in kind and size. Only for a recipe that takes data.
        memory_budget: such as "8GB", for calibration beside the model; by default half of the memory that is free.
        offload: for a GPU too small for the pipeline, which is then in host memory before and afterwards: "model", one
            part at a time is on `device`, or "group", one block of the backbone or one layer of another part. A recipe
            without data is carried out in host memory.
        out: folder to save the whole pipeline to, as `DiffusionPipeline.from_pretrained` loads it. A calibration that
            was stopped continues when the full-precision pipeline is given again with the same `out`.
        call: arguments of the pipeline's call as it will be used for one prompt (num_inference_steps, guidance_scale,
            negative_prompt, callback_on_step_end, ...); those not given are the pipeline's own defaults. Texts,
            embeddings, latents, and the images of a pipeline that takes some (`image`, `mask_image`, `control_image`),
            may also have an entry for every prompt, and `prompt_embeds` take the place of `calibration`. With a
            callback, a calibration that was stopped starts anew.

    Raises UsageError for arguments that do not fit, UserError for a backbone that no family knows, that is quantized
    already, offloaded, or holds LoRA adapters, and for a folder `out` that is in use.
    """
    family, target = _family(pipe), None if out is None else _free_folder(Path(out))
    every = family.backbones_of(pipe)
    for name, each in every.items():
        _check_backbone(each, name, f"components={list(every)}" if len(every) > 1 else "")
    call = _complete_call(family.prompted(pipe), call)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, w, a)
    elif w or a:
        raise UsageError("w and a set the formats of a recipe given by name or file; this one has its own")
    recipe = with_components(recipe, (f"{name}={source}" for name, source in components.items()))
    check_names(recipe, list(pipe.components), family.component)
    check_components(pipe, recipe)
    others = component_names(recipe)
    backbones = {name: each for name, each in every.items() if name not in others}
    backbone = backbones[family.component]
    if warning := unmatched(backbone, recipe):
        logging.getLogger("dmquant").warning(warning)
    device = _check_offload(pipe, offload, device)
    named, recipe = recipe, completed(of_backbone(recipe), backbone)
    with _workspace(target) as workspace:
        if recipe.calibrated:
            for each in backbones.values():
                check_attention(each)
            settings = _calibration(pipe, family, recipe, calibration, memory_budget, call)
            settings = replace(settings, offload=offload, device=device)
            one_by_one = [replace(settings, family=replace(family, component=name)) for name in backbones]
            with _offloaded(pipe, offload, device):
                calibrated = calibrate_all(pipe, one_by_one, workspace, _LoggingConsole(), weights_key(pipe))
            done = [(one.layers, one.recipe) for one in calibrated]
        else:
            done = [(quantize_layers_(each, recipe), recipe) for each in backbones.values()]
        for each, (_, its_recipe) in zip(backbones.values(), done, strict=True):
            mark_quantized(each, its_recipe)
        layers, recipe = [layer for of_one, _ in done for layer in of_one], done[0][1]
        parts = quantize_components(pipe, named, _LoggingConsole())
        if target is not None:
            _save(pipe, target, recipe, list(backbones))
    return Quantized(recipe, layers, footprint(nn.ModuleList(backbones.values())), parts)


def _family(pipe: "DiffusionPipeline") -> Family:
    try:
        return family_of(pipe)
    except UserError as error:
        raise UserError(f"{error}; `dmquant.quantize_(module, 'rtn')` quantizes any module without data") from None


def _free_folder(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use: choose another folder for the quantized pipeline")
    return out


def _save(pipe: "DiffusionPipeline", folder: Path, recipe: Recipe, backbones: Sequence[str]) -> None:
    formats, dtype = (format_name(recipe.weights), format_name(recipe.activations)), getattr(pipe, backbones[0]).dtype
    save_whole(pipe, folder, model_card(folder.name, recipe.name, *formats, type(pipe).__name__, dtype), backbones)


def _check_backbone(backbone: nn.Module, component: str, fused: str) -> None:
    """UserError for a backbone that is not plain weights in memory; `fused` is what fuse_lora has to be told."""
    modules = list(backbone.modules())
    if getattr(backbone, "hf_quantizer", None) is not None or any(
        isinstance(each, tuple(QUANTIZED.values())) for each in modules
    ):
        raise UserError(f"the {component} is already quantized: start from the full-precision pipeline")
    if any(hasattr(each, "base_layer") for each in modules):  # of peft
        raise UserError(
            f"the {component} holds LoRA adapters: call fuse_lora({fused}) and then unload_lora_weights() to "
            "quantize it with them, or unload_lora_weights() alone and load them again afterwards"
        )
    if any(map(_is_hooked, modules)) or any(parameter.is_meta for parameter in backbone.parameters()):
        raise UserError(
            f"the {component} is offloaded or on the meta device, or casts its weights: quantize the pipeline as "
            "from_pretrained loads it, without device_map, and enable casting or offloading afterwards"
        )


def _check_offload(pipe: "DiffusionPipeline", offload: str | None, device: str) -> str:
    """The device to offload from; UsageError for a way that is not known and a pipeline that is not in host memory."""
    if offload is None:
        return ""
    check_choice("way to offload", offload, OFFLOADS)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if elsewhere := [
        name for name, part in parts.items() if any(each.device.type != "cpu" for each in part.parameters())
    ]:
        raise UsageError(f"the {elsewhere[0]} is not in host memory: give the pipeline with offload before it is moved")
    if hooked := [name for name, part in parts.items() if any(map(_is_hooked, part.modules()))]:
        raise UsageError(f"the {hooked[0]} has hooks of offloading or casting already: leave it to offload='{offload}'")
    return resolve_device(device)


@contextlib.contextmanager
def _offloaded(pipe: "DiffusionPipeline", offload: str | None, device: str) -> Iterator[None]:
    """The pipeline is offloaded until the block ends, and then in host memory; as it is where `offload` is None."""
    if offload is None:
        yield
        return
    try:
        place(pipe, device, offload)
        yield
    finally:
        end_offloading(pipe)


def _is_hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves or casts the module's weights; an empty registry of hooks does nothing."""
    return hasattr(module, "_hf_hook") or bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def _complete_call(prompted: Any, call: dict[str, Any]) -> dict[str, Any]:
    """`call` with the number of steps, which is the pipeline's own unless given; UsageError for unknown arguments."""
    signature = inspect.signature(prompted.__call__)
    parameters = {name: each for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD}
    for name in call:
        if name in REFUSED and call[name] is not None:
            raise UsageError(f"'{name}' is not for quantize_pipeline: {REFUSED[name]}")
        if name not in parameters:
            raise unknown("argument", name, parameters, f"{type(prompted).__name__} is not called with it")
    steps = {} if any(call.get(name) is not None for name in SCHEDULES) else {STEPS: parameters[STEPS].default}
    return steps | {name: value for name, value in call.items() if name not in WITHOUT_EFFECT}


def _calibration(
    pipe: "DiffusionPipeline",
    family: Family,
    recipe: Recipe,
    prompts: Sequence[str] | str | None,
    memory_budget: str | None,
    call: dict[str, Any],
) -> _Calibration:
    kind = type(pipe).__name__
    if kind not in family.pipelines and kind not in family.with_images:
        raise UserError(
            f"a {kind} takes more than prompts, so it cannot calibrate: quantize the {family.component} in a "
            f"{' or '.join(family.pipelines)} of the same parts, or use a recipe without data such as rtn"
        )
    if kind in family.with_images and not any(call.get(name) is not None for name in PICTURES):
        raise UsageError(
            f"a {kind} takes images: give those to calibrate with, as in `image=[...]`: one a prompt, or one"
        )
    backbone = getattr(pipe, family.component)
    height, width = _image_size(pipe, backbone, call)
    parameters = inspect.signature(pipe.__call__).parameters
    frames = call.get(FRAMES) or (parameters[FRAMES].default if FRAMES in parameters else 1)
    batch_size = 1 if kind in family.edits else batch_size_for(height, width, frames)
    listed = _prompts(kind, prompts, call, height, width)
    dtype = next((name for name, dtype in DTYPES.items() if dtype == backbone.dtype), str(backbone.dtype))
    budget = None if memory_budget is None else parse_size(memory_budget, "memory_budget")
    return _Calibration(family, recipe, listed, budget, batch_size, call, dtype)


def _image_size(pipe: "DiffusionPipeline", backbone: nn.Module, call: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels; what the call leaves out is what the backbone was made for, or the call's default."""
    latent = backbone.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    if latent is None:
        parameters = inspect.signature(pipe.__call__).parameters
        return tuple(call.get(side) or parameters[side].default for side in ("height", "width"))
    sides = latent if isinstance(latent, Sequence) else (latent, latent)
    factor = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    own = [side * factor for side in sides]
    return call.get("height") or own[0], call.get("width") or own[1]


def _prompts(
    kind: str, prompts: Sequence[str] | str | None, call: dict[str, Any], height: int, width: int
) -> list[str] | None:
    """The prompts to calibrate with, None where the call has their embeddings."""
    if call.get(EMBEDDED) is not None:
        if prompts is not None:
            raise UsageError(f"'{EMBEDDED}' take the place of prompts: give either them or `calibration`")
        return None
    if prompts is None:
        prompts = _default_prompts(kind, height, width)
    return load_prompts(prompts) if isinstance(prompts, str) else list(prompts)


def _default_prompts(kind: str, height: int, width: int) -> str:
    relatives = [spec for spec in registered_models().values() if spec.pipeline == kind]
    nearest = min(relatives, key=lambda spec: abs(spec.height - height) + abs(spec.width - width), default=None)
    return DEFAULT_PROMPTS if nearest is None else nearest.calibration_prompts


@contextlib.contextmanager
def _workspace(out: Path | None) -> Iterator[Path]:
    """The work folder of a calibration: beside `out` until it is finished, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="dmquant-") as folder:
            yield Path(folder)
        return
    with owned.workspace(out) as room:
        yield room / runfolder.CALIBRATION
