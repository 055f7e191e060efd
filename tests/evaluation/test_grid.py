import numpy as np
import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.grid import (
    CAPTION_LINES,
    FONT_SIZE,
    GAP,
    LINE_WIDTH,
    MARGIN,
    SMALLEST,
    _fitted,
    _spread,
    _wrapped,
    draw_grid,
)
from tests.evaluation.conftest import smooth_images, write_images


@pytest.fixture
def columns(tmp_path):
    images = smooth_images(5, size=64)
    return {
        "full precision": write_images(tmp_path / "fp", images),
        "w4a6": write_images(tmp_path / "quantized", (images.int() + 10).clamp(max=255).to(torch.uint8)),
    }


PROMPTS = [f"prompt {index}" for index in range(5)]


def test_small_images_are_doubled_and_rows_share_a_line(tmp_path, columns):
    path = draw_grid(columns, PROMPTS, tmp_path / "grid.png", amplify=None)
    row_width = 2 * 128 + GAP
    with Image.open(path) as sheet:
        assert sheet.width == 4 * (row_width + MARGIN) + MARGIN
        assert 2 * 128 < sheet.height < 2 * 128 + 200


def test_large_images_are_reduced_to_one_row_a_line(tmp_path):
    images = smooth_images(2, size=1024)
    columns = {name: write_images(tmp_path / name, images) for name in ("a", "b")}
    with Image.open(draw_grid(columns, PROMPTS[:2], tmp_path / "grid.png")) as sheet:
        assert sheet.width == 3 * 384 + 2 * GAP + 2 * MARGIN


def test_the_difference_column_is_the_absolute_difference_times_the_factor(tmp_path):
    base = torch.full((1, 3, 128, 128), 100, dtype=torch.uint8)
    columns = {
        "full precision": write_images(tmp_path / "fp", base),
        "w4a6": write_images(tmp_path / "quantized", base - 7),
    }
    with Image.open(draw_grid(columns, PROMPTS[:1], tmp_path / "grid.png", amplify=5.0)) as sheet:
        pixels = np.asarray(sheet)
    centre = [MARGIN + 64 + column * (128 + GAP) for column in range(3)]
    assert [pixels[130, x].tolist() for x in centre] == [[100] * 3, [93] * 3, [35] * 3]


@pytest.mark.parametrize("recipes", range(2, 7))
def test_several_recipes_stand_beside_full_precision_without_differences_on_a_sheet_that_fits(tmp_path, recipes):
    greys = [100 + 20 * index for index in range(recipes + 1)]
    columns = {
        f"recipe with a long name {grey}": write_images(
            tmp_path / str(grey), torch.full((2, 3, 1024, 1024), grey, dtype=torch.uint8)
        )
        for grey in greys
    }
    with Image.open(draw_grid(columns, PROMPTS[:2], tmp_path / "grid.png", rows=1)) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert sheet.width <= LINE_WIDTH
    line = pixels[len(pixels) // 2]
    side = (line == greys[0]).sum()
    assert side >= SMALLEST
    centres = [MARGIN + side // 2 + column * (side + GAP) for column in range(recipes + 1)]
    assert line[centres].tolist() == greys


def test_the_rows_shown_are_spread_over_all_prompts():
    assert _spread(5, 8) == [0, 1, 2, 3, 4]
    assert _spread(101, 5) == [0, 25, 50, 75, 100]
    assert _spread(9, 1) == [0]


def test_captions_fit_their_row():
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    for text in ("word " * 60, "w" * 300, "short", "  two\n lines "):
        lines = _wrapped(text, 264, font)
        assert len(lines) <= CAPTION_LINES
        assert all(font.getlength(line) <= 264 for line in lines)
    assert _fitted("short", 264, font) == "short"
    assert _fitted("w" * 300, 264, font).endswith("...")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "00004.png").unlink(), "4 images for 5 prompts"),
        (lambda folder: (folder / "00004.png").rename(folder / "00009.png"), r"lacks 1 of 5 images \(00004"),
        (lambda folder: (folder / "00004.png").write_bytes(b"\x89PNG"), "not a readable image"),
        (lambda folder: Image.new("RGB", (8, 8)).save(folder / "00004.png"), "differ in size"),
    ],
)
def test_folders_that_do_not_match_are_an_error_and_nothing_is_written(tmp_path, columns, damage, message):
    damage(columns["w4a6"])
    with pytest.raises(UserError, match=message):
        draw_grid(columns, PROMPTS, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
