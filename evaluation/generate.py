"""Generate images, or videos, that are comparable pair by pair: the same prompt, seed and initial noise on both sides.

Every image has its own seed, drawn on the CPU, so its noise depends neither on the batch it is made in nor on the
device. Every PNG carries its prompt, its seed and the key of the settings that made it; one that is on disk with the
right key is not made again. A video is an animated PNG. Beside it lie the image's final latents, and beside the first
few their trajectories.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from dmquant.diffusers.calling import call_pipeline
from dmquant.diffusers.watching import recording_latents
from dmquant.evaluation.animated_png import encoded
from dmquant.evaluation.final_latents import has_latent, latent_path, save_latent
from dmquant.evaluation.pictures import FilePicture, opened_inputs
from dmquant.evaluation.png import KEY, read_key
from dmquant.evaluation.trajectory import (
    TRAJECTORIES,
    has_trajectory,
    recording_trajectories,
    save_trajectory,
    trajectory_path,
)
from dmquant.host import owned, processes
from dmquant.host.files import json_sha256, replacing
from dmquant.host.text import escaped

MAX_BATCH = 16
PIXELS_PER_BATCH = 1024 * 1024


@dataclass(frozen=True)
class ImageRequest:
    """An image to make: its number in the set, prompt, seed, and the key of everything that determines it.

    With `latents`, an image that is there without its final latents counts as missing. `inputs` are the images that the
    pipeline is given beside the prompt, by argument of its call.
    """

    index: int
    prompt: str
    seed: int
    key: str
    latents: bool = False
    inputs: Mapping[str, FilePicture] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name, as in `00042.png`."""
        return f"{self.index:05d}.png"


@dataclass
class Generated:
    """The result of `generate`: seconds by image key for the images it made, and the keys of those with NaN or inf."""

    seconds: dict[str, float] = field(default_factory=dict)
    not_finite: set[str] = field(default_factory=set)


def image_requests(
    prompts: Sequence[str],
    seed: int,
    settings: str,
    latents: bool = False,
    inputs: Sequence[Mapping[str, FilePicture]] = (),
) -> list[ImageRequest]:
    """Requests, one for each prompt; image `i` gets seed `seed + i`. `settings` is the key of all they share.

    `inputs` are the images that go with each prompt, where any do.
    """
    requests = []
    for index, prompt in enumerate(prompts):
        own = inputs[index] if inputs else {}
        given = [{name: picture.sha256 for name, picture in own.items()}] if own else []
        key = json_sha256([settings, prompt, seed + index, *given])[:32]
        requests.append(ImageRequest(index, prompt, seed + index, key, latents, own))
    return requests


def batch_size_for(height: int, width: int, frames: int = 1) -> int:
    """Images a batch: 16 at 64x64 and up to 256x256, 4 at 512x512, 1 at 1024x1024 and above; all frames count."""
    return max(1, min(MAX_BATCH, PIXELS_PER_BATCH // (height * width * frames)))


def missing(folder: Path, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """The requests whose image is not yet in `folder`, whole, with the right key, and with its latents if wanted.

    One whose trajectory is there and damaged is missing, too.
    """
    return [request for request in requests if not _is_there(folder / request.name, request)]


def _is_there(path: Path, request: ImageRequest) -> bool:
    if read_key(path) != request.key or (request.latents and not has_latent(path, request.key)):
        return False
    return not trajectory_path(path).exists() or has_trajectory(path, request.key)


def prune(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Remove images of ours that no request asks for any more, and what lies beside them; other files stay."""
    names = {request.name for request in requests}
    for path in folder.glob("[0-9]*.png"):
        if path.name not in names and read_key(path) is not None:
            for each in (path, latent_path(path), trajectory_path(path)):
                owned.remove(each)


def pruned_and_missing(folder: Path, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """`missing`, after `prune`."""
    prune(folder, requests)
    return missing(folder, requests)


def unfinished_batches(
    folder: Path, requests: Sequence[ImageRequest], batch_size: int, as_alone: bool = False
) -> list[Sequence[ImageRequest]]:
    """The batches, of the whole list, in which an image is missing.

    Pixels depend on the images of a batch by rounding, so a batch is made as a whole, and a set that was stopped on the
    way is the same at the end as one that was not. Images that are made `as_alone` do not: the batches are of those
    that are missing.
    """
    absent = missing(folder, requests)
    wanted, listed = {request.index for request in absent}, absent if as_alone else requests
    batches = (listed[start : start + batch_size] for start in range(0, len(listed), batch_size))
    return [batch for batch in batches if any(request.index in wanted for request in batch)]


def generate(
    pipeline: Any,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    batch_size: int,
    call: dict[str, Any],
    as_alone: bool = False,
    before_saving: Callable[[Generated], None] = lambda generated: None,
    on_batch: Callable[[Generated], None] = lambda generated: None,
) -> Generated:
    """Make the batches of `requests` that `folder` lacks an image of, each process its share of them.

    Batches are cut from the whole list, so a resumed run, or one of several processes, computes the same batches as
    one that was never stopped. All processes get the same result; the seconds of an image are those that passed,
    divided by the images made in them.

    Args:
        pipeline: a diffusers pipeline that takes prompts, and images where requests have some, on its device.
        folder: where `00000.png` and so on go; created if need be. A PNG appears there whole or not at all, and after
            its latents.
        batch_size: images a batch.
        call: arguments of the pipeline's call other than prompt, generator and output type: height, width,
            num_inference_steps, guidance_scale, and what its family needs.
        as_alone: whether the pipeline makes an image to the bit as it does without others (`deterministic`).
        before_saving: called with all that was made so far before a batch, or one of each process, is written: what it
            keeps is known of every image that is there.
        on_batch: called after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everyone = processes.current()
    batches = everyone.on_main(lambda: unfinished_batches(folder, requests, batch_size, as_alone))
    generated = Generated()
    for start in range(0, len(batches), everyone.count):
        at_once, began = batches[start : start + everyone.count], time.perf_counter()
        made = [_Batch(batch) for batch in everyone.share(at_once)]
        for not_finite in everyone.together(
            lambda made=made: {key for one in made for key in one.make(pipeline, call)}
        ):
            generated.not_finite |= not_finite
        keys = [request.key for batch in at_once for request in batch]
        generated.seconds |= dict.fromkeys(keys, (time.perf_counter() - began) / len(keys))
        before_saving(generated)
        everyone.together(lambda made=made: _save_all(made, folder))
        on_batch(generated)
    return generated


def pixels_alone(pipeline: Any, request: ImageRequest, call: dict[str, Any]) -> np.ndarray:
    """The pixels that `generate` saves of one image, uint8 [height, width, 3], made in a batch of one.

    Of a video they are [frames, height, width, 3].
    """
    return _pixels(_call(pipeline, [request], call)[0])


class _Batch:
    """Images that are made together, with their latents and trajectories."""

    def __init__(self, requests: Sequence[ImageRequest]):
        self.requests = requests

    def make(self, pipeline: Any, call: dict[str, Any]) -> list[str]:
        """Run the pipeline; returns the keys of the images that hold NaN or infinity."""
        followed = sum(request.index < TRAJECTORIES for request in self.requests)
        with recording_latents(pipeline) as latents, recording_trajectories(pipeline, followed) as steps:
            self._images = _call(pipeline, self.requests, call)
        self._latents, self._trajectories = torch.cat(latents) if latents else (), steps.trajectories
        finite = np.isfinite(self._images).all(axis=tuple(range(1, self._images.ndim)))
        return [request.key for request, whole in zip(self.requests, finite, strict=True) if not whole]

    def save(self, folder: Path) -> None:
        """Write the files of every image, the image itself last."""
        paths = [(request, folder / request.name) for request in self.requests]
        for (request, path), latent in zip(paths, self._latents, strict=False):
            save_latent(latent, path, request.key)
        for (request, path), trajectory in zip(paths, self._trajectories, strict=False):
            save_trajectory(trajectory, path, request.key)
        for (request, path), image in zip(paths, self._images, strict=True):
            _save(image, request, path)


def _save_all(batches: Sequence[_Batch], folder: Path) -> None:
    for batch in batches:
        batch.save(folder)


def _call(pipeline: Any, batch: Sequence[ImageRequest], call: dict[str, Any]) -> np.ndarray:
    """Images of one batch, float32 [images, height, width, 3] in 0..1, or videos [videos, frames, height, width, 3]."""
    prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
    call = call | opened_inputs([request.inputs for request in batch])
    made = np.asarray(call_pipeline(pipeline, prompts, seeds, "np", call), dtype=np.float32)
    return made[:, 0] if made.ndim == 5 and made.shape[1] == 1 else made  # of one frame it is an image


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.rint(np.nan_to_num(image, nan=0.0).clip(0, 1) * 255).astype(np.uint8)


def _save(image: np.ndarray, request: ImageRequest, path: Path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", escaped(request.prompt))
    about.add_text("seed", str(request.seed))
    about.add_text(KEY, request.key)
    pixels = _pixels(image)
    with replacing(path) as partial:
        if pixels.ndim == 3:
            Image.fromarray(pixels).save(partial, format="PNG", pnginfo=about)
        else:
            partial.write_bytes(encoded([Image.fromarray(frame) for frame in pixels], about))
