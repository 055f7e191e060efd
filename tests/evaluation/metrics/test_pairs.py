"""Values of pairs of images, whatever is measured."""

import os
import socket
from pathlib import Path

import pytest
import torch

from dmquant.evaluation.metrics import pairs as metric_pairs
from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.host import processes
from tests.evaluation.conftest import score, smooth_images, with_noise, write_images
from tests.forked import started


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
    monkeypatch.setattr(metric_pairs, "PIXELS_PER_BATCH", 5 * 32 * 32)
    a = smooth_images(12)
    seen = []
    score(folders(a, with_noise(a, 5.0)), "psnr", progress=lambda *step: seen.append(step))
    assert seen == [("PSNR", 5, 12), ("PSNR", 10, 12), ("PSNR", 12, 12)]


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
    metric_pairs.PIXELS_PER_BATCH = 2 * 176 * 176
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.joined():
        scored = score_pairs(*dirs, SHARED)
    torch.save({name: metric.values for name, metric in scored.items()}, out / f"{rank}.pt")
