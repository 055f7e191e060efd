"""PSNR against its closed form."""

import math

import numpy as np
import pytest

from tests.evaluation.conftest import score, smooth_images, with_noise


def psnr_numpy(a, b):
    squared = (a.numpy().astype(np.float64) - b.numpy()) ** 2
    return 10 * np.log10(255.0**2 / squared.mean(axis=(1, 2, 3)))


def test_psnr_is_the_closed_form_of_every_image(folders):
    a = smooth_images(4)
    b = with_noise(a, 6.0)
    result = score(folders(a, b), "psnr")
    assert result.values == pytest.approx(psnr_numpy(a, b), rel=1e-12)
    assert result.value == pytest.approx(psnr_numpy(a, b).mean(), rel=1e-12)
    assert (result.images, result.note) == (4, None)


def test_psnr_of_a_constant_difference_is_known(folders):
    a = smooth_images(2).clamp(max=200)
    result = score(folders(a, a + 5), "psnr")
    assert result.value == pytest.approx(20 * math.log10(255 / 5), rel=1e-12)
    assert (result.low, result.high) == pytest.approx((result.value, result.value))


def test_identical_images_count_as_the_cap_and_the_note_says_how_many(folders):
    a = smooth_images(2)
    b = a.clone()
    b[1] = with_noise(a[1:], 10.0)[0]
    result = score(folders(a, b), "psnr")
    assert result.values == pytest.approx((100, psnr_numpy(a[1:], b[1:])[0]))
    assert result.note == "1 of 2 pairs are identical and count as 100 dB"
