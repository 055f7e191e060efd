"""Small folders of images for the tests of dmquant.evaluation."""

import hashlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dmquant.evaluation.images import load_image, save_image
from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.result import Backbone


def smooth_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Colour gradients with texture, uint8 [count, 3, size, size]: neither constant nor noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 4, 4, 3)).astype(np.uint8)
    pictures = [Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in coarse]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def with_noise(images: Tensor, sigma: float, seed: int = 1) -> Tensor:
    """`images` with Gaussian noise of `sigma` 8-bit steps, uint8."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * sigma
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def write_images(folder: Path, images: Tensor) -> Path:
    """Write uint8 [N, 3, H, W] as 00000.png, 00001.png, ... to `folder`, which is returned."""
    for index, image in enumerate(images):
        save_image(image, folder / f"{index:05d}.png")
    return folder


class RandomNetwork:
    """Eight fixed random features, each a nonlinear projection of an 8x8 thumbnail; counts the images it looks at."""

    preparation = "thumbnail-8"

    def __init__(self, name: str = "random", batch_size: int = 5):
        self.backbone = Backbone(name, hashlib.sha256(name.encode()).hexdigest())
        self.batch_size = batch_size
        self.projection = torch.randn(3 * 64, 8, generator=torch.Generator().manual_seed(0)) / 8
        self.calls = 0

    def prepare(self, path: Path) -> Tensor:
        image = load_image(path).float() / 255
        roughness = image.diff(dim=-1).abs().mean()
        return torch.cat([nn.functional.adaptive_avg_pool2d(image, 8).flatten(), roughness[None]])

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls += len(batch)
        return (batch[:, :-1] @ self.projection).tanh() + batch[:, -1:]


@pytest.fixture
def networks() -> Networks:
    """Networks of which `inception` and `clip` are random ones, and the LPIPS distances stand-ins."""
    networks = Networks()
    networks.lpips = {"alex": Distance(), "vgg": Distance()}.__getitem__
    networks.inception = RandomNetwork("random Inception")
    networks.clip = RandomNetwork("random CLIP")
    return networks


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, and no network."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return tmp_path / "hub"


@pytest.fixture
def folders(tmp_path):
    """Write two image tensors as fp/ and quantized/ and return the folders."""

    def write(reference, quantized):
        return write_images(tmp_path / "fp", reference), write_images(tmp_path / "quantized", quantized)

    return write


def score(dirs, name, **options):
    return score_pairs(*dirs, [name], **options)[name]


class Distance(nn.Module):
    """Stands in for LPIPS: the mean difference of two images."""

    backbone = Backbone("random", "0" * 64)
    smallest = 16

    def forward(self, a, b):
        return (a.float() - b.float()).abs().mean((1, 2, 3))
