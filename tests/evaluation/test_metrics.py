import math

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dmquant.errors import UsageError, UserError
from dmquant.evaluation.latents import latent_path, save_latent
from dmquant.evaluation.metrics import NAMES, NOT_IMPLEMENTED, bootstrap_interval, frechet_distance
from dmquant.evaluation.score import score_pairs, score_reference
from tests.evaluation.conftest import smooth_images, with_noise, write_images


@pytest.fixture
def folders(tmp_path):
    """Write two image tensors as fp/ and quantized/ and return the folders."""

    def write(reference, quantized):
        return write_images(tmp_path / "fp", reference), write_images(tmp_path / "quantized", quantized)

    return write


def test_psnr_is_the_closed_form_averaged_over_images(folders):
    a = smooth_images(4)
    b = with_noise(a, 6.0)
    squared = (a.numpy().astype(np.float64) - b.numpy()) ** 2
    expected = np.mean(10 * np.log10(255.0**2 / squared.mean(axis=(1, 2, 3))))
    result = score_pairs(*folders(a, b), ["psnr"])["psnr"]
    assert result.value == pytest.approx(expected, abs=1e-5)
    assert result.images == 4
    assert result.note is None


def test_psnr_of_a_constant_difference_is_known(folders):
    a = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    result = score_pairs(*folders(a, a + 5), ["psnr"])["psnr"]
    assert result.value == pytest.approx(20 * math.log10(255 / 5), abs=1e-5)
    assert (result.low, result.high) == pytest.approx((result.value, result.value))


def test_identical_images_count_as_the_cap_and_the_note_says_how_many(folders):
    a = smooth_images(2)
    b = a.clone()
    b[1] = with_noise(a[1:], 10.0)[0]
    result = score_pairs(*folders(a, b), ["psnr", "ssim"])
    other = 10 * math.log10(255.0**2 / (a[1].double() - b[1].double()).square().mean().item())
    assert result["psnr"].value == pytest.approx((100 + other) / 2)
    assert result["psnr"].note == "1 of 2 pairs are identical and count as 100 dB"


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
    result = score_pairs(with_latents("fp", a), with_latents("quantized", b, "other"), ["latent_mse"])["latent_mse"]
    each = ((b.astype(np.float64) - a) ** 2).mean(axis=(1, 2, 3))
    assert result.value == pytest.approx(each.mean(), rel=1e-12)
    assert each.min() < result.low < result.value < result.high < each.max()
    assert result.images == 6


def test_latent_mse_of_images_without_latents_is_not_computed_and_says_why(folders, with_latents):
    reason = score_pairs(*folders(smooth_images(3), smooth_images(3)), ["latent_mse"])["latent_mse"].reason
    assert reason.startswith("3 of 3 images in fp have no final latents beside them")
    latents = np.zeros((2, 4, 2, 2), dtype=np.float32)
    a, b = with_latents("a", latents), with_latents("b", latents)
    latent_path(b / "00001.png").unlink()
    assert score_pairs(a, b, ["latent_mse"])["latent_mse"].reason.startswith("1 of 2 images in b have no final latents")


def test_latent_mse_with_nan_is_not_computed_and_of_two_sizes_is_an_error(with_latents):
    latents = np.zeros((2, 4, 2, 2), dtype=np.float32)
    broken = latents.copy()
    broken[1, 0, 0, 0] = np.nan
    a = with_latents("a", latents)
    reason = score_pairs(a, with_latents("b", broken), ["latent_mse"])["latent_mse"].reason
    assert reason == "1 of 2 images have NaN or infinity in their final latents"
    with pytest.raises(UserError, match="differ in size"):
        score_pairs(a, with_latents("c", np.zeros((2, 4, 4, 4), dtype=np.float32)), ["latent_mse"])


def test_ssim_of_identical_images_is_one(folders):
    a = smooth_images(3)
    assert score_pairs(*folders(a, a), ["ssim"])["ssim"].value == 1.0


def test_ssim_agrees_with_its_definition_in_numpy(folders):
    a = smooth_images(2, size=20)
    b = with_noise(a, 12.0)
    expected = np.mean([_ssim_numpy(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    assert score_pairs(*folders(a, b), ["ssim"])["ssim"].value == pytest.approx(expected, abs=1e-9)


def test_ssim_of_images_smaller_than_its_window_is_not_computed(folders):
    a = smooth_images(2, size=8)
    result = score_pairs(*folders(a, a), ["ssim"])["ssim"]
    assert result.value is None
    assert "11x11" in result.reason


def test_more_noise_scores_worse_on_every_metric(tmp_path, extractor):
    a = smooth_images(24)
    reference = write_images(tmp_path / "fp", a)
    names = ["psnr", "ssim", "fid_fp"]
    little, much = (
        score_pairs(reference, write_images(tmp_path / str(sigma), with_noise(a, sigma)), names, inception=extractor)
        for sigma in (4.0, 20.0)
    )
    assert little["psnr"].value > much["psnr"].value + 10
    assert little["ssim"].value > much["ssim"].value + 0.1
    assert little["fid_fp"].value < much["fid_fp"].value / 2


def test_fid_of_a_folder_with_itself_is_zero(folders, extractor):
    a = smooth_images(12)
    result = score_pairs(*folders(a, a), ["fid_fp"], inception=extractor)["fid_fp"]
    assert result.value == pytest.approx(0, abs=1e-7)
    assert result.backbone == extractor.backbone


@pytest.mark.parametrize(("n", "m"), [(200, 150), (5, 7)])
def test_frechet_distance_agrees_with_an_independent_formula(n, m):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12))
    b = rng.normal(size=(m, 12)) * 0.7 + 0.3
    distance = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert distance == pytest.approx(_frechet_numpy(a, b), rel=1e-6)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    a = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(a, a + 2.0) == pytest.approx(6 * 4.0, rel=1e-6)


def test_fid_says_when_its_covariance_is_rank_deficient(tmp_path, extractor):
    few = write_images(tmp_path / "few", smooth_images(8))
    many = write_images(tmp_path / "many", smooth_images(9))
    assert "rank-deficient" in score_pairs(few, few, ["fid_fp"], inception=extractor)["fid_fp"].note
    assert score_pairs(many, many, ["fid_fp"], inception=extractor)["fid_fp"].note == "9 against 9 images"


def test_fid_of_one_image_is_not_computed(folders, extractor):
    a = smooth_images(1)
    result = score_pairs(*folders(a, a), ["fid_fp", "psnr"], inception=extractor)
    assert "at least 2 images" in result["fid_fp"].reason
    assert result["psnr"].low is None  # one image has no interval


def test_fid_against_real_images_of_other_sizes_differs_from_fid_against_full_precision(tmp_path, folders, extractor):
    a = smooth_images(12)
    dirs = folders(a, with_noise(a, 8.0))
    write_images(tmp_path / "real" / "small", smooth_images(6, size=24, seed=5))
    write_images(tmp_path / "real" / "large", smooth_images(6, size=48, seed=6))
    quantized = score_pairs(*dirs, ["fid_fp", "fid_real"], real=tmp_path / "real", inception=extractor)
    reference = score_reference(dirs[0], ["fid_fp", "psnr", "fid_real"], real=tmp_path / "real", inception=extractor)
    assert quantized["fid_real"].value > quantized["fid_fp"].value
    assert list(reference) == ["fid_real"]
    assert reference["fid_real"].value != quantized["fid_real"].value
    assert extractor.network.calls == 36, "each image is looked at once"


def test_fid_against_real_images_needs_them(folders):
    a = smooth_images(2)
    assert "--real" in score_pairs(*folders(a, a), ["fid_real"])["fid_real"].reason


def test_metrics_that_this_version_lacks_are_listed_with_the_reason(folders):
    a = smooth_images(2)
    result = score_pairs(*folders(a, a), list(NOT_IMPLEMENTED))
    assert list(result) == list(NOT_IMPLEMENTED)
    assert all(metric.value is None and "not implemented" in metric.reason for metric in result.values())


def test_an_unknown_metric_is_wrong_usage_and_the_nearest_is_suggested(tmp_path):
    with pytest.raises(UsageError, match="'fid_fp'"):
        score_pairs(tmp_path, tmp_path, ["fidfp"])
    assert set(NAMES) == {
        *("psnr", "ssim", "lpips", "fid_fp", "fid_real", "kid_fp", "cmmd_fp", "clip_score", "hpsv2", "latent_mse")
    }


def test_a_missing_counterpart_is_an_error_whatever_the_metric(tmp_path, extractor):
    write_images(tmp_path / "fp", smooth_images(4))
    write_images(tmp_path / "quantized", smooth_images(3))
    with pytest.raises(UserError, match="00003"):
        score_pairs(tmp_path / "fp", tmp_path / "quantized", ["fid_fp"], inception=extractor)


def test_progress_counts_every_image(folders, extractor):
    a = smooth_images(7)
    seen = []
    score_pairs(*folders(a, a), ["psnr", "fid_fp"], inception=extractor, progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "PSNR"] == [("PSNR", done, 7) for done in range(1, 8)]
    assert seen[-1] == ("Inception features", 7, 7)


def test_the_bootstrap_interval_holds_the_mean_and_shrinks_as_the_root_of_n():
    values = torch.randn(1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 30
    widths = []
    for n in (100, 1600):
        low, high = bootstrap_interval(values[:n])
        assert low < values[:n].mean() < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)
    assert widths[1] == pytest.approx(2 * 1.96 / 40, rel=0.1)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def _frechet_numpy(a, b):
    """Fréchet distance with the square root taken of a symmetric matrix, as torchmetrics does not."""
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross


def _ssim_numpy(x, y):
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
