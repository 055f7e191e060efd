"""Latent MSE of the latents that lie beside the images."""

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dmquant.errors import UserError
from dmquant.evaluation.final_latents import latent_path, save_latent
from tests.evaluation.conftest import score, smooth_images


@pytest.fixture
def with_latents(tmp_path):
    """Write images with the given latents [N, ...] beside them, as `generate` does, to a folder, which is returned."""

    def write(name, latents, key="key"):
        folder = tmp_path / name
        folder.mkdir()
        about = PngImagePlugin.PngInfo()
        about.add_text("key", key)
        for index, latent in enumerate(latents):
            Image.new("RGB", (16, 16)).save(folder / f"{index:05d}.png", pnginfo=about)
            save_latent(torch.from_numpy(latent), folder / f"{index:05d}.png", key)
        return folder

    return write


def test_latent_mse_is_the_mean_over_images_of_the_squared_difference(with_latents):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 4, 8, 8)).astype(np.float32)
    b = a + rng.normal(scale=np.linspace(0.01, 0.2, 6)[:, None, None, None], size=a.shape).astype(np.float32)
    result = score((with_latents("fp", a), with_latents("quantized", b, "other")), "latent_mse")
    each = ((b.astype(np.float64) - a) ** 2).mean(axis=(1, 2, 3))
    assert result.values == pytest.approx(each, rel=1e-12)
    assert each.min() < result.low < result.value < result.high < each.max()
    assert result.images == 6


def test_latent_mse_of_images_without_latents_is_not_computed_and_says_why(folders, with_latents):
    reason = score(folders(smooth_images(3), smooth_images(3)), "latent_mse").reason
    assert reason.startswith("3 of 3 images in fp have no final latents beside them")
    latents = np.zeros((2, 4, 2, 2), dtype=np.float32)
    a, b = with_latents("a", latents), with_latents("b", latents)
    latent_path(b / "00001.png").unlink()
    assert score((a, b), "latent_mse").reason.startswith("1 of 2 images in b have no final latents")


def test_latent_mse_with_nan_is_not_computed_and_of_two_sizes_is_an_error(with_latents):
    latents = np.zeros((2, 4, 2, 2), dtype=np.float32)
    broken = latents.copy()
    broken[1, 0, 0, 0] = np.nan
    a = with_latents("a", latents)
    reason = score((a, with_latents("b", broken)), "latent_mse").reason
    assert reason == "1 of 2 images (00001.png) have NaN or infinity in their final latents"
    with pytest.raises(UserError, match="differ in size"):
        score((a, with_latents("c", np.zeros((2, 4, 4, 4), dtype=np.float32))), "latent_mse")
