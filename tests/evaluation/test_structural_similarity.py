"""SSIM and MS-SSIM against numpy and torchmetrics."""

import numpy as np
import pytest
import torch

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.evaluation.structural_similarity import ms_ssim, ssim
from tests.evaluation.conftest import score, smooth_images, with_noise


def test_ssim_agrees_with_its_definition_in_numpy(folders):
    a = smooth_images(2, size=20)
    b = with_noise(a, 12.0)
    expected = [ssim_numpy(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert score(folders(a, b), "ssim").values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(176, 181), (183, 177)])
def test_ssim_and_ms_ssim_agree_with_torchmetrics(height, width):
    ensure_torchvision_imports()
    from torchmetrics.functional import image as torchmetrics

    a = smooth_images(1, size=200)[..., :height, :width].double()
    b = with_noise(a, 40.0).double()
    options = {"data_range": 255.0, "reduction": "none"}
    expected = torchmetrics.structural_similarity_index_measure(b, a, **options)
    torch.testing.assert_close(ssim(b, a), expected, atol=1e-12, rtol=0)
    expected = torchmetrics.multiscale_structural_similarity_index_measure(b, a, **options)
    torch.testing.assert_close(ms_ssim(b, a), expected, atol=1e-8, rtol=0)  # its exponents are float32


def test_ms_ssim_of_opposite_images_is_zero_and_not_nan():
    a = torch.arange(176).remainder(2)[None, None, None].expand(1, 3, 176, 176) * 255
    assert ssim(a, 255 - a).item() < 0
    assert ms_ssim(a, 255 - a).item() == 0


@pytest.mark.parametrize(("name", "size", "least"), [("ssim", 8, "11x11"), ("ms_ssim", 175, "176x176")])
def test_images_that_are_too_small_are_said_to_be(folders, name, size, least):
    a = smooth_images(2, size=size)
    result = score(folders(a, a), name)
    assert result.value is None
    assert result.reason.startswith(f"images of {size} pixels are smaller than the {least} that")


def ssim_numpy(x, y):
    """Mean SSIM of two uint8 images [3, H, W], written from the paper's equation 13 with reflected borders."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2

    def blur(channel):
        padded = np.pad(channel, 5, mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(padded, (11, 11))
        return np.einsum("hwij,ij->hw", patches, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        cov = blur(a * b) - mean_a * mean_b
        numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
        scores.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(scores)
