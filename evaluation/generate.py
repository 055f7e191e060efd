"""Generate images that are comparable pair by pair: the same prompt, seed and initial noise on both sides.

Every image has its own seed, drawn on the CPU, so its noise depends neither on the batch it is made in nor on the
device. Every PNG carries its prompt, its seed and the key of the settings that made it; one that is on disk with the
right key is not made again. Beside it lie the image's final latents.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from dmquant.evaluation.latents import latent_path, read_latent, recording_latents, save_latent
from dmquant.files import replacing
from dmquant.pipeline_call import call_pipeline

MAX_BATCH = 16
PIXELS_PER_BATCH = 1024 * 1024


@dataclass(frozen=True)
class ImageRequest:
    """One image to make: its number in the set, prompt, seed, and the key of everything that determines it.

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
    """What a call of `generate` did: seconds by image key for the images it made, and how many held NaN or inf."""

    seconds: dict[str, float] = field(default_factory=dict)
    not_finite: int = 0


def image_requests(prompts: Sequence[str], seed: int, settings: str, latents: bool = False) -> list[ImageRequest]:
    """One request a prompt; image `i` gets seed `seed + i`. `settings` stands for all that the prompts share."""
    requests = []
    for index, prompt in enumerate(prompts):
        key = hashlib.sha256(json.dumps([settings, prompt, seed + index]).encode()).hexdigest()[:32]
        requests.append(ImageRequest(index, prompt, seed + index, key, latents))
    return requests


def batch_size_for(height: int, width: int) -> int:
    """Images a batch: 16 at 64x64 and up to 256x256, 4 at 512x512, 1 at 1024x1024 and above."""
    return max(1, min(MAX_BATCH, PIXELS_PER_BATCH // (height * width)))


def read_key(path: Path) -> str | None:
    """The key of a whole, readable PNG of ours; None for anything else."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get("key")
    except (OSError, SyntaxError, ValueError):
        return None


def read_prompt(path: Path) -> str | None:
    """The prompt that a PNG of ours was made from, or None."""
    with Image.open(path) as image:
        return image.info.get("prompt")


def missing(folder: Path, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """The requests whose image is not yet in `folder`, whole, with the right key, and with its latents if wanted."""
    return [request for request in requests if not _is_there(folder / request.name, request)]


def _is_there(path: Path, request: ImageRequest) -> bool:
    if read_key(path) != request.key:
        return False
    return not request.latents or read_latent(path, request.key) is not None


def prune(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Remove images of ours that no request asks for any more, and their latents; other files stay."""
    names = {request.name for request in requests}
    for path in folder.glob("[0-9]*.png"):
        if path.name not in names and read_key(path) is not None:
            path.unlink()
            latent_path(path).unlink(missing_ok=True)


def generate(
    pipeline: Any,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    batch_size: int,
    call: dict[str, Any],
    on_batch: Callable[[Generated], None] = lambda generated: None,
) -> Generated:
    """Make the images of `requests` that `folder` lacks, in batches.

    Batches are cut from the whole list before the finished images are left out, so a resumed run computes the same
    batches as one that was never stopped.

    Args:
        pipeline: a diffusers text-to-image pipeline, on its device.
        folder: where `00000.png` and so on go; created if need be. A PNG appears there whole or not at all, and after
            its latents.
        batch_size: images a batch.
        call: arguments of the pipeline's call other than prompt, generator and output type: height, width,
            num_inference_steps, guidance_scale, and what its family needs.
        on_batch: called after every batch with all that was made so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {request.index for request in missing(folder, requests)}
    generated = Generated()
    for start in range(0, len(requests), batch_size):
        batch = [request for request in requests[start : start + batch_size] if request.index in wanted]
        if not batch:
            continue
        began = time.perf_counter()
        with recording_latents(pipeline) as latents:
            images = _call(pipeline, batch, call)
        generated.not_finite += int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        if latents:
            for request, latent in zip(batch, torch.cat(latents), strict=True):
                save_latent(latent, folder / request.name, request.key)
        for request, image in zip(batch, images, strict=True):
            _save(image, request, folder)
        each = (time.perf_counter() - began) / len(batch)
        generated.seconds |= {request.key: each for request in batch}
        on_batch(generated)
    return generated


def _call(pipeline: Any, batch: Sequence[ImageRequest], call: dict[str, Any]) -> np.ndarray:
    """Images of one batch, float32 [images, height, width, 3] in 0..1."""
    prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
    return np.asarray(call_pipeline(pipeline, prompts, seeds, "np", call), dtype=np.float32)


def _save(image: np.ndarray, request: ImageRequest, folder: Path) -> None:
    pixels = np.rint(np.nan_to_num(image, nan=0.0).clip(0, 1) * 255).astype(np.uint8)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", request.prompt)
    about.add_text("seed", str(request.seed))
    about.add_text("key", request.key)
    with replacing(folder / request.name) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=about)
