import numpy as np
import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.report.image_grid import (
    CAPTION_LINES,
    GAP,
    LARGEST,
    LINE_HEIGHT,
    LINE_WIDTH,
    MARGIN,
    MOST_PIXELS,
    SMALLEST,
    _length,
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


@pytest.fixture
def greys(tmp_path):
    """A function from grey values to columns of two even 1024x1024 images each."""

    def columns(values):
        return {
            f"recipe with a long name {grey}": write_images(
                tmp_path / str(grey), torch.full((2, 3, 1024, 1024), grey, dtype=torch.uint8)
            )
            for grey in values
        }

    return columns


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_up_to_twelve_columns_stand_side_by_side_above_their_differences(tmp_path, greys, count):
    values = [100 + 10 * index for index in range(count)]
    with Image.open(draw_grid(greys(values), PROMPTS[:2], tmp_path / "grid.png", rows=1, amplify=2.0)) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    side = max(SMALLEST, min(LARGEST, (LINE_WIDTH - 2 * MARGIN + GAP) // count - GAP))
    centres = [MARGIN + side // 2 + column * (side + GAP) for column in range(count)]
    (top,) = np.flatnonzero((pixels[:, centres] == values).all(axis=1))[:1]
    assert pixels[top + side // 2, centres].tolist() == values
    if count > 1:
        assert pixels[top + side + GAP + side // 2, centres[1:]].tolist() == [20 * index for index in range(1, count)]


def test_without_amplification_there_are_no_differences(tmp_path, greys):
    def height(**options):
        with Image.open(draw_grid(greys([100, 90, 80]), PROMPTS[:2], tmp_path / "grid.png", **options)) as sheet:
            return sheet.height

    assert height() - height(amplify=None) == 2 * (LARGEST + GAP)


def test_the_worst_pairs_come_first_and_say_how_far_they_are_apart(tmp_path):
    base = torch.full((4, 3, 128, 128), 100, dtype=torch.uint8)
    apart = base.clone()
    for index, distance in enumerate((3, 40, 0, 20)):
        apart[index] += distance
    columns = {"fp": write_images(tmp_path / "fp", base), "q": write_images(tmp_path / "q", apart)}
    with Image.open(
        draw_grid(columns, PROMPTS[:4], tmp_path / "grid.png", rows=2, worst=True, amplify=None, per_line=1)
    ) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    column = pixels[:, MARGIN + 128 + GAP + 64]
    assert [grey for grey in (140, 120, 103) if (column == grey).sum() == 128] == [140, 120]
    assert np.flatnonzero(column == 140).max() < np.flatnonzero(column == 120).min()


def test_prompts_share_a_line_as_told(tmp_path, columns):
    def width(per_line):
        path = draw_grid(columns, PROMPTS, tmp_path / "grid.png", amplify=None, per_line=per_line)
        with Image.open(path) as sheet:
            return sheet.width

    row_width = 2 * 128 + GAP
    assert [width(n) for n in (1, 2, 5)] == [n * (row_width + MARGIN) + MARGIN for n in (1, 2, 5)]


def test_the_picture_stays_within_its_size_however_many_rows_are_asked_for(tmp_path, columns):
    many = {name: write_images(tmp_path / f"many {name}", smooth_images(200)) for name in columns}
    with Image.open(draw_grid(many, ["a long prompt " * 9] * 200, tmp_path / "grid.png", rows=200)) as sheet:
        assert 0.5 * MOST_PIXELS < sheet.width * sheet.height <= 1.1 * MOST_PIXELS


def test_the_rows_shown_are_spread_over_all_prompts():
    assert _spread(5, 8) == [0, 1, 2, 3, 4]
    assert _spread(101, 5) == [0, 25, 50, 75, 100]
    assert _spread(9, 1) == [0]


def test_captions_are_wrapped_in_full():
    text = "  a photo of\n one hundred words " + "word " * 30
    lines = _wrapped(text, 264, CAPTION_LINES)
    assert " ".join(lines) == " ".join(text.split())
    assert all(_length(line) <= 264 for line in lines)
    assert "".join(_wrapped("w" * 60, 264, CAPTION_LINES)) == "w" * 60
    assert _wrapped("rtn-fp8_e3m4-fp8_e3m4", 110, 4) == ["rtn-fp8_e3m4-", "fp8_e3m4"]


def test_a_caption_that_is_absurdly_long_is_cut_and_says_so():
    lines = _wrapped("word " * 500, 264, CAPTION_LINES)
    assert len(lines) == CAPTION_LINES
    assert lines[-1].endswith("…")
    assert all(_length(line) <= 264 for line in lines)


def test_long_captions_make_their_own_line_taller_and_no_other(tmp_path, columns):
    def height(*captions):
        path = draw_grid(columns, [*captions, *PROMPTS[len(captions) :]], tmp_path / "grid.png", per_line=1)
        with Image.open(path) as sheet:
            return sheet.height

    assert height("word " * 60) - height("word") == (len(_wrapped("word " * 60, 400, 8)) - 1) * LINE_HEIGHT


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


def test_what_went_into_the_pipeline_comes_first(tmp_path):
    base = torch.full((2, 3, 128, 128), 100, dtype=torch.uint8)
    columns = {
        "full precision": write_images(tmp_path / "fp", base),
        "w4a6": write_images(tmp_path / "a", base - 7),
        "w8a8": write_images(tmp_path / "b", base - 1),
    }
    inputs = {"input": write_images(tmp_path / "in", base - 50)}
    for count in (2, 3):
        some = dict(list(columns.items())[:count])
        with Image.open(draw_grid(some, PROMPTS[:2], tmp_path / "grid.png", amplify=5.0, inputs=inputs)) as sheet:
            pixels = np.asarray(sheet)
        assert [pixels[140, MARGIN + 64 + column * (128 + GAP)][0] for column in range(3)] == [50, 100, 93]
