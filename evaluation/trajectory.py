"""The latents after every step of the sampler, kept beside the first images of a set.

They show at which steps a quantized backbone leaves the way that full precision takes from the same noise.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.diffusers.watching import watching_steps
from dmquant.host.sealed import load_sealed, save_sealed, sealed_about

TRAJECTORIES = 8
"""Images of a set whose trajectories are kept: at 1024 pixels one can take 50 MB."""
SUFFIX = ".trajectory.safetensors"


@dataclass(frozen=True)
class Trajectory:
    """The way of one image: float64 `timesteps` [steps], and float32 `latents` [steps, ...] after each."""

    timesteps: Tensor
    latents: Tensor


class TrajectoryRecorder:
    """Collects the steps of one call of a pipeline, for the first `images` of its batch."""

    def __init__(self, images: int):
        self._images = images
        self._timesteps: list[float] = []
        self._latents: list[Tensor] = []

    def add(self, timestep: float, latents: Tensor) -> None:
        """Take in the latents [rows, ...] of any dtype after a step; with guidance, images are the first rows."""
        self._timesteps.append(timestep)
        self._latents.append(latents[: self._images].to("cpu", torch.float32, copy=True))

    @property
    def trajectories(self) -> list[Trajectory]:
        """The trajectories of the images, in the order of the batch; empty where nothing was recorded."""
        if not self._latents:
            return []
        timesteps = torch.tensor(self._timesteps, dtype=torch.float64)
        return [Trajectory(timesteps, latents) for latents in torch.stack(self._latents, dim=1)]


@contextlib.contextmanager
def recording_trajectories(pipeline: Any, images: int) -> Iterator[TrajectoryRecorder]:
    """Record the first `images` of the batch that the pipeline is called with inside the block; 0 records nothing."""
    recorder = TrajectoryRecorder(images)
    if not images:
        yield recorder
        return
    with watching_steps(pipeline, recorder.add):
        yield recorder


def trajectory_path(image: Path) -> Path:
    """The path of the trajectory of the image at `image`: `00003.trajectory.safetensors` beside `00003.png`."""
    return image.with_suffix(SUFFIX)


def save_trajectory(trajectory: Trajectory, image: Path, key: str) -> None:
    """Write the trajectory of one image beside it, whole or not at all; `key` is the image's own."""
    save_sealed(trajectory_path(image), {name: each.contiguous() for name, each in vars(trajectory).items()}, key)


def read_trajectory(image: Path, key: str | None) -> Trajectory | None:
    """The trajectory made together with the image of that key; None where there is none, or a damaged one."""
    tensors, of_image = load_sealed(trajectory_path(image)) or ({}, None)
    return Trajectory(**tensors) if tensors and of_image == key else None


def has_trajectory(image: Path, key: str) -> bool:
    """Whether `read_trajectory` would give any."""
    return sealed_about(trajectory_path(image)) == key
