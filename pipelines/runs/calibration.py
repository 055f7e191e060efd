"""Calibrate the backbone of a loaded pipeline: its data, from its own sampler, then its blocks one after another."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dmquant.calib.blocks.engine import Calibrated, calibrate_
from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.diffusers.families import Family
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.pipelines.models.placing import place_backbone_alone
from dmquant.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmquant.calib.data.store import CalibrationStore

FIRST_SEED = 1_000_000  # of the noise of calibration prompts: far from the seeds of images
DATA = "data"


class CalibrationSettings(Protocol):
    """The part of a run's Settings that calibration reads; the Python interface has no more than this."""

    family: Family
    recipe: Recipe
    calibration_prompts: Sequence[str]
    calibration_data: Path | None
    memory_budget: int | None
    batch_size: int
    call: dict[str, Any]
    dtype_name: str
    device: str
    offload: bool


def calibrate(
    pipeline: "DiffusionPipeline", settings: CalibrationSettings, workspace: Path, console: Console, weights: str
) -> Calibrated:
    """Quantize the backbone in place by a recipe that takes data; what is finished is kept in `workspace`.

    `weights` is the key of the full-precision pipeline. Raises UserError for calibration data made for something else,
    and as `capture` and `calibrate_` do.
    """
    family, recipe = settings.family, settings.recipe
    backbone = getattr(pipeline, family.component)
    store = calibration_data(pipeline, settings, workspace, console, weights)
    if settings.offload:
        place_backbone_alone(pipeline, family.component, settings.device)
    return calibrate_(
        backbone,
        recipe,
        store,
        blocks=family.blocks(backbone),
        folder=workspace / f"{recipe.name}-{fingerprint(recipe=recipe.to_dict())[:8]}",
        made_for=_made_for(settings, weights),
        counted=family.counted(backbone),
        memory_budget=settings.memory_budget,
        bar=console.bar,
        say=console.say,
    )


def calibration_data(
    pipeline: "DiffusionPipeline", settings: CalibrationSettings, workspace: Path, console: Console, weights: str
) -> "CalibrationStore":
    """The recipe's calibration data; what is missing of it is captured now, by all processes of a command together."""
    wanted, listed = settings.recipe.calibration, settings.calibration_prompts
    prompts = listed[: wanted.prompts]
    if len(listed) < wanted.prompts:
        console.say(f"note: the recipe asks for {wanted.prompts} calibration prompts, the list has {len(listed)}")
    with console.bar("calibration data") as bar:
        store = capture(
            settings.family.prompted(pipeline),
            settings.family.component,
            prompts,
            sampling=_sampling(settings),
            call=settings.call,
            seed=FIRST_SEED,
            batch_size=settings.batch_size,
            folder=settings.calibration_data or workspace / DATA / data_key(settings, weights)[:8],
            made_for=_made_for(settings, weights),
            shared=settings.family.shared,
            progress=bar,
        )
    held_out = sum(sample.held_out for sample in store.samples)
    console.say(
        f"calibration data: {len(prompts)} prompts, {len(store) - held_out} backbone calls to learn from and "
        f"{held_out} held out, {wanted.sampler} over {store.steps} steps"
    )
    return store


def data_key(settings: CalibrationSettings, weights: str) -> str:
    """Fingerprint of all that calibration data depends on, `weights` being the key of the full-precision pipeline."""
    return fingerprint(
        made_for=_made_for(settings, weights),
        sampling=vars(_sampling(settings)),
        prompts=settings.calibration_prompts[: settings.recipe.calibration.prompts],
        call=settings.call,
    )


def _made_for(settings: CalibrationSettings, weights: str) -> dict[str, str]:
    """The facts that calibration depends on beside the recipe and the prompts."""
    return {"weights": weights, "dtype": settings.dtype_name}


def _sampling(settings: CalibrationSettings) -> Sampling:
    wanted = settings.recipe.calibration
    return Sampling(wanted.sampler, wanted.steps_per_prompt, wanted.held_out, wanted.seed)


def weights_key(pipeline: "DiffusionPipeline") -> str:
    """The key of a pipeline in memory: SHA-256 of the names, dtypes and bytes of the state of its parts."""
    digest = hashlib.sha256()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part, module in sorted(parts.items()):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
