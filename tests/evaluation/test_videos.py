"""Videos: animated PNGs keep every frame, and pairs of them are scored frame by frame and shown as strips."""

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dmquant.errors import UserError
from dmquant.evaluation.animated_png import FRAMES_A_SECOND, encoded
from dmquant.evaluation.difference import open_alike, rms_difference
from dmquant.evaluation.images import (
    STRIP,
    ImagePairs,
    image_size,
    load_frames,
    load_image,
    number_of_frames,
    open_strip,
)
from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.evaluation.metrics.psnr import decibels
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.png import KEY, read_key, read_prompt
from dmquant.evaluation.report.image_grid import draw_grid
from dmquant.evaluation.report.page.gallery import _size
from dmquant.evaluation.report.page.pictures import embed

HEIGHT, WIDTH = 24, 32


def pixels(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(path, video, key="k"):
    """As `generate` saves it."""
    path.parent.mkdir(exist_ok=True)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", "a boat")
    about.add_text(KEY, key)
    path.write_bytes(encoded([Image.fromarray(frame) for frame in video], about))
    return path


@pytest.mark.parametrize("frames", [2, 3, 7])
def test_a_video_comes_back_frame_by_frame_with_its_key_and_prompt(frames, tmp_path):
    video = pixels(frames)
    path = save(tmp_path / "00000.png", video)
    assert number_of_frames(path) == frames
    assert torch.equal(load_frames(path), torch.from_numpy(video).movedim(-1, 1))
    assert torch.equal(load_image(path), torch.from_numpy(video[frames // 2]).movedim(-1, 0))
    assert (read_key(path), read_prompt(path), image_size(path)) == ("k", "a boat", (WIDTH, HEIGHT))
    with Image.open(path) as image:
        assert image.is_animated
        assert image.info["duration"] == pytest.approx(1000 / FRAMES_A_SECOND)
    path.write_bytes(path.read_bytes()[:-40])
    assert read_key(path) is None


def test_equal_neighbours_stay_frames_of_their_own(tmp_path):
    video = np.repeat(pixels(1), 5, axis=0)
    assert torch.equal(load_frames(save(tmp_path / "a.png", video)), torch.from_numpy(video).movedim(-1, 1))


def test_an_animation_of_others_is_still_refused(tmp_path):
    frames = [Image.fromarray(frame) for frame in pixels(2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    for read in (load_image, load_frames, open_strip, number_of_frames):
        with pytest.raises(UserError, match="is animated"):
            read(tmp_path / "a.png")


def test_pairs_are_scored_by_the_mean_over_frames(tmp_path):
    reference, other = pixels(5), pixels(5, seed=1)
    other[2] = reference[2]  # counts as 100 dB
    save(tmp_path / "fp" / "00000.png", reference)
    save(tmp_path / "q" / "00000.png", other)
    save(tmp_path / "fp" / "00001.png", reference)
    save(tmp_path / "q" / "00001.png", reference)
    metrics = score_pairs(tmp_path / "fp", tmp_path / "q", ["psnr", "ssim"], None, Networks())
    of_frames = decibels(*(torch.from_numpy(video).movedim(-1, 1) for video in (other, reference)))
    assert metrics["psnr"].values == pytest.approx((of_frames.clamp(max=100).mean().item(), 100.0))
    assert "1 of 2 pairs are identical" in metrics["psnr"].note
    assert metrics["ssim"].values[0] < metrics["ssim"].values[1] == pytest.approx(1)


def test_videos_of_unequal_length_are_no_pair(tmp_path):
    save(tmp_path / "fp" / "0.png", pixels(3))
    save(tmp_path / "q" / "0.png", pixels(2))
    with pytest.raises(UserError, match="differ in their number of frames"):
        ImagePairs.open(tmp_path / "fp", tmp_path / "q").load(0)


def test_a_strip_shows_the_first_and_the_last_frame_and_some_between(tmp_path):
    video = pixels(9)
    strip, shown = open_strip(save(tmp_path / "a.png", video))
    assert shown == STRIP == 4
    wanted = np.concatenate([video[number] for number in (0, 3, 5, 8)], axis=1)
    assert np.array_equal(np.asarray(strip), wanted)
    assert _size(tmp_path / "a.png") == strip.size
    assert open_strip(save(tmp_path / "b.png", video[:2]))[1] == 2


def test_grid_and_page_show_strips(tmp_path):
    reference, other = pixels(4), pixels(4, seed=1)
    paths = [save(tmp_path / "fp" / "0.png", reference), save(tmp_path / "q" / "0.png", other)]
    assert rms_difference(*open_alike(paths)) > 50
    grid = draw_grid({"full precision": tmp_path / "fp", "w4": tmp_path / "q"}, ["a boat"], tmp_path / "grid.png")
    with Image.open(grid) as sheet:
        width, height = sheet.size
    assert width > 4 * 128
    assert height > 3 * 96  # full precision, the other, their difference
    uris, encoding = embed(paths)
    assert len(uris) == 2
    assert encoding is not None
    assert all(uri.startswith("data:image/webp") for uri in uris)
