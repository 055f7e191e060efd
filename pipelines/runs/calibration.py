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
from dmquant.pipelines.runs.runfolder import fingerprint
from dmquant.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmquant.calib.data.store import CalibrationStore

FIRST_SEED = 1_000_000  # of the noise of calibration prompts: far from the seeds of images
DATA = "data"


class CalibrationSettings(Protocol):
    """What calibrating reads of a run's Settings; the Python interface gives no more than this."""

    family: Family
    recipe: Recipe
    calibration_prompts: Sequence[str]
    calibration_data: Path | None
    memory_budget: int | None
    batch_size: int
    call: dict[str, Any]
    dtype_name: str


def calibrate(
    pipeline: "DiffusionPipeline", settings: CalibrationSettings, workspace: Path, console: Console
) -> Calibrated:
    """Quantize the backbone in place by a recipe that takes data; what is finished is kept in `workspace`.

    Raises UserError for calibration data made for something else, and as `capture` and `calibrate_` do.
    """
    family, recipe = settings.family, settings.recipe
    backbone = getattr(pipeline, family.component)
    made_for = _made_for(pipeline, settings)
    store = calibration_data(pipeline, settings, workspace, console)
    return calibrate_(
        backbone,
        recipe,
        store,
        blocks=family.blocks(backbone),
        folder=workspace / f"{recipe.name}-{fingerprint(recipe=recipe.to_dict())[:8]}",
        made_for=made_for,
        counted=family.counted(backbone),
        memory_budget=settings.memory_budget,
        bar=console.bar,
        say=console.say,
    )


def calibration_data(
    pipeline: "DiffusionPipeline", settings: CalibrationSettings, workspace: Path, console: Console
) -> "CalibrationStore":
    """What the recipe learns from, as far as it is not there captured now; of several processes, by all together."""
    made_for = _made_for(pipeline, settings)
    wanted, listed = settings.recipe.calibration, settings.calibration_prompts
    prompts = listed[: wanted.prompts]
    if len(listed) < wanted.prompts:
        console.say(f"note: the recipe asks for {wanted.prompts} calibration prompts, the list has {len(listed)}")
    sampling = Sampling(wanted.sampler, wanted.steps_per_prompt, wanted.held_out, wanted.seed)
    key = fingerprint(made_for=made_for, sampling=vars(sampling), prompts=prompts, call=settings.call)
    with console.bar("calibration data") as bar:
        store = capture(
            settings.family.prompted(pipeline),
            settings.family.component,
            prompts,
            sampling=sampling,
            call=settings.call,
            seed=FIRST_SEED,
            batch_size=settings.batch_size,
            folder=settings.calibration_data or workspace / DATA / key[:8],
            made_for=made_for,
            shared=settings.family.shared,
            progress=bar,
        )
    held_out = sum(sample.held_out for sample in store.samples)
    console.say(
        f"calibration data: {len(prompts)} prompts, {len(store) - held_out} backbone calls to learn from and "
        f"{held_out} held out, {wanted.sampler} over {store.steps} steps"
    )
    return store


def _made_for(pipeline: "DiffusionPipeline", settings: CalibrationSettings) -> dict[str, str]:
    """What calibration depends on beside the recipe and the prompts."""
    return {"backbone": weights_hash(getattr(pipeline, settings.family.component)), "dtype": settings.dtype_name}


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
