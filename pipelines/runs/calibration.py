"""Calibrate the backbone of a loaded pipeline: its data, from its own sampler, then its blocks one after another."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dmquant.calib.blocks.codes import meaning_of
from dmquant.calib.blocks.engine import Calibrated, calibrate_
from dmquant.calib.blocks.state import plans_to_calibrate
from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.calib.objectives import IMPORTANCE, needs_of
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import Family
from dmquant.host.console import Console
from dmquant.host.files import fingerprint, json_sha256
from dmquant.pipelines.models.placing import GROUP, end_offloading, place_backbone_alone
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
    calibration_prompts: Sequence[str] | None
    """None where `calibration_call` has the embeddings of prompts."""
    calibration_data: Path | None
    memory_budget: int | None
    batch_size: int
    calibration_call: dict[str, Any]
    called_in: dict[str, Any]
    """What is called, where that is another pipeline than the model's own, as JSON can hold it."""
    dtype_name: str
    device: str
    offload: str | None

    def prompted(self, pipeline: "DiffusionPipeline") -> Any:
        """The pipeline as something that is called with prompts and the arguments `calibration_call`."""


def calibrate(
    pipeline: "DiffusionPipeline", settings: CalibrationSettings, workspace: Path, console: Console, weights: str
) -> Calibrated:
    """Quantize the backbone in place by a recipe that takes data; what is finished is kept in `workspace`.

    `weights` is the key of the full-precision pipeline. Raises UserError for calibration data made for something else,
    and as `capture` and `calibrate_` do.
    """
    return calibrate_all(pipeline, [settings], workspace, console, weights)[0]


def calibrate_all(
    pipeline: "DiffusionPipeline",
    settings: Sequence[CalibrationSettings],
    workspace: Path,
    console: Console,
    weights: str,
) -> list[Calibrated]:
    """`calibrate` for each of a pipeline's backbones, by its settings; the data of all come before one is changed."""
    for one in settings:
        # which may raise, and capturing takes long
        plans_to_calibrate(getattr(pipeline, one.family.component), one.recipe)
    stores = [calibration_data(pipeline, one, workspace, console, weights) for one in settings]
    return [
        _calibrate(pipeline, one, store, workspace, console, weights)
        for one, store in zip(settings, stores, strict=True)
    ]


def _calibrate(
    pipeline: "DiffusionPipeline",
    settings: CalibrationSettings,
    store: "CalibrationStore",
    workspace: Path,
    console: Console,
    weights: str,
) -> Calibrated:
    family, recipe = settings.family, settings.recipe
    backbone, device = getattr(pipeline, family.component), None
    if settings.offload == GROUP:
        end_offloading(pipeline)
        device = torch.device(settings.device)
    elif settings.offload:
        place_backbone_alone(pipeline, family.component, settings.device)
    return calibrate_(
        backbone,
        recipe,
        store,
        blocks=family.blocks(backbone),
        folder=workspace / f"codes-{family.prefix.replace('.', '-')}{fingerprint(recipe=meaning_of(recipe))[:8]}",
        made_for=_made_for(settings, weights),
        counted=family.counted(backbone),
        memory_budget=settings.memory_budget,
        device=device,
        bar=console.bar,
        say=console.say,
    )


def calibration_data(
    pipeline: "DiffusionPipeline",
    settings: CalibrationSettings,
    workspace: Path,
    console: Console,
    weights: str,
) -> "CalibrationStore":
    """The recipe's calibration data; what is missing of it is captured now, by all processes of a command together."""
    wanted, calls, key = settings.recipe.calibration, calls_of(settings), data_key(settings, weights)[:8]
    if len(calls) < wanted.prompts:
        console.say(f"note: the recipe asks for {wanted.prompts} calibration prompts, the list has {len(calls)}")
    first = folder = settings.calibration_data or workspace / DATA / key
    if settings.family.prefix:  # not the first backbone
        folder = first.with_name(f"{first.name}-{settings.family.component}")
    with console.bar("calibration data") as bar:
        store = capture(
            settings.prompted(pipeline),
            settings.family.component,
            calls,
            sampling=_sampling(settings),
            batch_size=settings.batch_size,
            folder=folder,
            made_for=_made_for(settings, weights),
            **settings.family.batching,
            weighted=IMPORTANCE in needs_of(settings.recipe.learning.objective),
            progress=bar,
            replace=first.name == key,  # as runs and sweeps name those that are theirs alone
        )
    held_out = sum(sample.held_out for sample in store.samples)
    title = f"calibration data of {settings.family.component}" if settings.family.prefix else "calibration data"
    console.say(
        f"{title}: {len(calls)} prompts, {len(store) - held_out} backbone calls to learn from and "
        f"{held_out} held out, {wanted.sampler} over {store.steps} steps"
    )
    return store


def calls_of(settings: CalibrationSettings) -> Calls:
    """The pipeline's calls with the prompts to calibrate with, as many as the recipe takes."""
    listed = Calls(settings.calibration_prompts, FIRST_SEED, settings.calibration_call)
    return listed.only(range(min(settings.recipe.calibration.prompts, len(listed))))


def data_key(settings: CalibrationSettings, weights: str) -> str:
    """Fingerprint of all that calibration data depends on, `weights` being the key of the full-precision pipeline."""
    calls = calls_of(settings)
    return fingerprint(
        made_for=_made_for(settings, weights),
        sampling=vars(_sampling(settings)),
        prompts=calls.prompts,
        call=calls.described(),
    )


def _made_for(settings: CalibrationSettings, weights: str) -> dict[str, Any]:
    """The facts that calibration depends on beside the recipe and the prompts."""
    return {"weights": weights, "dtype": settings.dtype_name, **settings.called_in}


def _sampling(settings: CalibrationSettings) -> Sampling:
    wanted = settings.recipe.calibration
    return Sampling(wanted.sampler, wanted.steps_per_prompt, wanted.held_out, wanted.seed)


def weights_key(pipeline: "DiffusionPipeline") -> str:
    """The key of a pipeline in memory: SHA-256 of the configurations, vocabularies, and tensors of its parts."""
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for part, it in sorted(pipeline.components.items()):
        digest.update(json_sha256([part, type(it).__name__, _configuration(it)]).encode())
        for name, tensor in sorted(it.state_dict().items()) if isinstance(it, nn.Module) else ():
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _configuration(part: Any) -> dict[str, Any]:
    """What a part of a pipeline is told besides its tensors, in JSON types; without versions and paths."""
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config |= part.get_vocab() if hasattr(part, "get_vocab") else {}
    return {str(name): repr(value) for name, value in config.items() if not str(name).startswith("_")}
