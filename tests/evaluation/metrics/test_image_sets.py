"""FID, KID and CMMD of folders of images, in features of random networks."""

import itertools

import numpy as np
import pytest

from dmquant.evaluation.metrics.compute import score_pairs, score_reference
from dmquant.evaluation.networks import CLIP
from tests.evaluation.conftest import smooth_images, with_noise, write_images


@pytest.fixture
def folders(tmp_path):
    """Full-precision images, the same with noise, and real ones of two sizes in subfolders."""
    images = smooth_images(12)
    write_images(tmp_path / "real" / "small", smooth_images(6, size=24, seed=5))
    write_images(tmp_path / "real" / "large", smooth_images(6, size=48, seed=6))
    noisy = write_images(tmp_path / "quantized", with_noise(images, 8.0))
    return write_images(tmp_path / "fp", images), noisy, tmp_path / "real"


def test_cmmd_is_the_biased_mmd_of_its_paper_times_a_thousand(folders, networks):
    fp, quantized, _ = folders
    a, b = (networks.store.images(networks.clip, sorted(folder.glob("*.png"))).double() for folder in (quantized, fp))

    def mean_kernel(x, y):
        pairs = itertools.product(x.numpy(), y.numpy())
        return np.mean([np.exp(-((one - other) ** 2).sum() / (2 * 10.0**2)) for one, other in pairs])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    metric = score_pairs(fp, quantized, ["cmmd_fp"], networks=networks)["cmmd_fp"]
    assert metric.value == pytest.approx(expected, rel=1e-9)
    assert metric.backbone == networks.clip.backbone
    networks.clip_name = "something else"
    assert CLIP in score_pairs(fp, quantized, ["cmmd_fp"], networks=networks)["cmmd_fp"].note


def test_identical_folders_have_no_distance_and_noise_makes_one(folders, networks):
    fp, quantized, _ = folders
    names = ["fid_fp", "kid_fp", "cmmd_fp"]
    same, apart = (score_pairs(fp, folder, names, networks=networks) for folder in (fp, quantized))
    assert same["fid_fp"].value == pytest.approx(0, abs=1e-6)
    assert same["cmmd_fp"].value == pytest.approx(0, abs=1e-6)
    assert same["kid_fp"].value == pytest.approx(0, abs=1e-9)
    assert all(apart[name].value > same[name].value + 1e-3 for name in ("fid_fp", "kid_fp", "cmmd_fp"))
    assert apart["kid_fp"].low < apart["kid_fp"].value < apart["kid_fp"].high


def test_real_images_are_another_reference_and_full_precision_is_compared_with_them_too(folders, networks):
    fp, quantized, real = folders
    names = ["fid_fp", "psnr", "fid_real", "kid_real", "cmmd_real"]
    scores = score_pairs(fp, quantized, names, real, networks)
    reference = score_reference(fp, names, real, networks)
    assert list(reference) == ["fid_real", "kid_real", "cmmd_real"]
    assert scores["fid_real"].value > scores["fid_fp"].value
    assert all(reference[name].value != scores[name].value for name in reference)
    assert "12 against 12 real images" in scores["fid_real"].note
    assert "12 against 12 full-precision images" in scores["fid_fp"].note
    assert networks.inception.calls == networks.clip.calls == 36, "each image is looked at once"


def test_without_real_images_the_reason_says_how_to_give_them(folders, networks):
    fp, quantized, _ = folders
    scores = score_pairs(fp, quantized, ["fid_real", "kid_real", "cmmd_real"], networks=networks)
    assert all("--real" in metric.reason for metric in scores.values())


def test_too_few_images_for_the_features_are_said_with_the_number(tmp_path, networks):
    few, many = (write_images(tmp_path / str(count), smooth_images(count)) for count in (8, 9))
    note = score_pairs(few, few, ["fid_fp"], networks=networks)["fid_fp"].note
    assert "fewer than 9, so the covariance of 8 features is rank-deficient" in note
    assert "rank-deficient" not in score_pairs(many, many, ["fid_fp"], networks=networks)["fid_fp"].note


@pytest.mark.parametrize("name", ["fid_fp", "kid_fp", "cmmd_fp"])
def test_one_image_has_no_distance(tmp_path, networks, name):
    one = write_images(tmp_path / "one", smooth_images(1))
    assert "at least 2 images" in score_pairs(one, one, [name], networks=networks)[name].reason
