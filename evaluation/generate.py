"""Generate images that are comparable pair by pair: the same prompt, seed and initial noise on both sides.

Every image has its own seed, drawn on the CPU, so its noise depends neither on the batch it is made in nor on the
device. Every PNG carries its prompt, its seed and the key of the settings that made it; one that is on disk with the
right key is not made again. Beside it lie the image's final latents, and beside the first few their trajectories.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from dmquant.diffusers.calling import call_pipeline
from dmquant.diffusers.watching import recording_latents
from dmquant.evaluation.final_latents import has_latent, latent_path, save_latent
from dmquant.evaluation.png import KEY, read_key
from dmquant.evaluation.trajectory import TRAJECTORIES, recording_trajectories, save_trajectory, trajectory_path
from dmquant.host import processes
from dmquant.host.files import json_sha256, replacing

MAX_BATCH = 16
PIXELS_PER_BATCH = 1024 * 1024


@dataclass(frozen=True)
class ImageRequest:
    """An image to make: its number in the set, prompt, seed, and the key of everything that determines it.

    With `latents`, an image that is there without its final latents counts as missing.
    """

    index: int
    prompt: str
    seed: int
    key: str
    latents: bool = False

    @property
    def name(self) -> str:
        """File name, as in `00042.png`."""
        return f"{self.index:05d}.png"


@dataclass
class Generated:
    """The result of `generate`: seconds by image key for the images it made, and the number that held NaN or inf."""

    seconds: dict[str, float] = field(default_factory=dict)
    not_finite: int = 0


def image_requests(prompts: Sequence[str], seed: int, settings: str, latents: bool = False) -> list[ImageRequest]:
    """Requests, one for each prompt; image `i` gets seed `seed + i`. `settings` is the key of all they share."""
    requests = []
    for index, prompt in enumerate(prompts):
        key = json_sha256([settings, prompt, seed + index])[:32]
        requests.append(ImageRequest(index, prompt, seed + index, key, latents))
    return requests


def batch_size_for(height: int, width: int) -> int:
    """Images a batch: 16 at 64x64 and up to 256x256, 4 at 512x512, 1 at 1024x1024 and above."""
    return max(1, min(MAX_BATCH, PIXELS_PER_BATCH // (height * width)))


def missing(folder: Path, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """The requests whose image is not yet in `folder`, whole, with the right key, and with its latents if wanted."""
    return [request for request in requests if not _is_there(folder / request.name, request)]


def _is_there(path: Path, request: ImageRequest) -> bool:
    if read_key(path) != request.key:
        return False
    return not request.latents or has_latent(path, request.key)


def prune(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Remove images of ours that no request asks for any more, and what lies beside them; other files stay."""
    names = {request.name for request in requests}
    for path in folder.glob("[0-9]*.png"):
        if path.name not in names and read_key(path) is not None:
            path.unlink()
            for beside in (latent_path(path), trajectory_path(path)):
                beside.unlink(missing_ok=True)


def pruned_and_missing(folder: Path, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """`missing`, after `prune`."""
    prune(folder, requests)
    return missing(folder, requests)


def generate(
    pipeline: Any,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    batch_size: int,
    call: dict[str, Any],
    on_batch: Callable[[Generated], None] = lambda generated: None,
) -> Generated:
    """Make the images of `requests` that `folder` lacks, in batches, each process its share of them.

    Batches are cut from the whole list before the finished images are left out, so a resumed run, or one of several
    processes, computes the same batches as one that was never stopped. All processes get the same result; the seconds
    of an image are those that passed, divided by the images made in them.

    Args:
        pipeline: a diffusers text-to-image pipeline, on its device.
        folder: where `00000.png` and so on go; created if need be. A PNG appears there whole or not at all, and after
            its latents.
        batch_size: images a batch.
        call: arguments of the pipeline's call other than prompt, generator and output type: height, width,
            num_inference_steps, guidance_scale, and what its family needs.
        on_batch: called after every batch, or one of each process, with all that was made so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everyone = processes.current()
    wanted = everyone.on_main(lambda: {request.index for request in missing(folder, requests)})
    whole = (requests[start : start + batch_size] for start in range(0, len(requests), batch_size))
    batches = list(filter(None, ([request for request in batch if request.index in wanted] for batch in whole)))
    generated = Generated()
    for start in range(0, len(batches), everyone.count):
        at_once, began = batches[start : start + everyone.count], time.perf_counter()
        mine = everyone.share(at_once)
        not_finite = everyone.together(lambda mine=mine: sum(_make(pipeline, batch, folder, call) for batch in mine))
        generated.not_finite += sum(not_finite)
        made = [request.key for batch in at_once for request in batch]
        generated.seconds |= dict.fromkeys(made, (time.perf_counter() - began) / len(made))
        on_batch(generated)
    return generated


def _make(pipeline: Any, batch: Sequence[ImageRequest], folder: Path, call: dict[str, Any]) -> int:
    """Make and write the images of one batch; returns how many held NaN or infinity."""
    followed = [request for request in batch if request.index < TRAJECTORIES]
    with recording_latents(pipeline) as latents, recording_trajectories(pipeline, len(followed)) as steps:
        images = _call(pipeline, batch, call)
    if latents:
        for request, latent in zip(batch, torch.cat(latents), strict=True):
            save_latent(latent, folder / request.name, request.key)
    for request, trajectory in zip(followed, steps.trajectories, strict=False):
        save_trajectory(trajectory, folder / request.name, request.key)
    for request, image in zip(batch, images, strict=True):
        _save(image, request, folder)
    return int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())


def _call(pipeline: Any, batch: Sequence[ImageRequest], call: dict[str, Any]) -> np.ndarray:
    """Images of one batch, float32 [images, height, width, 3] in 0..1."""
    prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
    return np.asarray(call_pipeline(pipeline, prompts, seeds, "np", call), dtype=np.float32)


def _save(image: np.ndarray, request: ImageRequest, folder: Path) -> None:
    pixels = np.rint(np.nan_to_num(image, nan=0.0).clip(0, 1) * 255).astype(np.uint8)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", request.prompt)
    about.add_text("seed", str(request.seed))
    about.add_text(KEY, request.key)
    with replacing(folder / request.name) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=about)
