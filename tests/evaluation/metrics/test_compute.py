"""What `score_pairs` and `score_reference` do whatever the metric."""

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.evaluation.metrics.compute import score_pairs, score_reference
from dmquant.evaluation.metrics.registry import METRICS
from tests.evaluation.conftest import smooth_images, write_images


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "fp", smooth_images(7))


def test_an_unknown_metric_is_wrong_usage_and_the_nearest_is_suggested(images):
    with pytest.raises(UsageError, match="'fid_fp'"):
        score_pairs(images, images, ["fidfp"])
    with pytest.raises(UsageError, match="'fid_real'"):
        score_reference(images, ["fidreal"])


def test_a_missing_counterpart_is_an_error_whatever_the_metric(images, tmp_path, networks):
    fewer = write_images(tmp_path / "quantized", smooth_images(6))
    for name in METRICS:
        with pytest.raises(UserError, match="00006"):
            score_pairs(images, fewer, [name], networks=networks)


def test_progress_counts_every_image_of_every_metric(images, networks):
    seen = []
    names = ["psnr", "fid_fp"]
    score_pairs(images, images, names, networks=networks, progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "PSNR"][-1] == ("PSNR", 7, 7)
    assert seen[-1] == ("Inception features", 7, 7)
