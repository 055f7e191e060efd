import contextlib
import errno
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation import image_files
from dmquant.evaluation.image_files import check_one_kind
from dmquant.evaluation.images import ImagePairs, any_images, generated_images, image_size, load_image, save_image
from dmquant.host.files import replacing, write_text
from tests.evaluation.conftest import smooth_images, write_images


def test_a_saved_image_loads_bit_equal(tmp_path):
    image = smooth_images(1, size=17)[0]
    save_image(image, tmp_path / "new" / "a.png")
    assert torch.equal(load_image(tmp_path / "new" / "a.png"), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_transparent_pixels_become_white(tmp_path):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image[:, 0, 0].tolist() == [255, 0, 0]
    assert image[:, 3, 3].tolist() == [255, 255, 255]


def test_a_truncated_image_is_a_user_error_that_names_it(tmp_path):
    folder = write_images(tmp_path, smooth_images(1, size=64))
    path = folder / "00000.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"00000\.png is not a readable image"):
        load_image(path)


def test_sixteen_bit_grey_images_are_refused(tmp_path):
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        load_image(tmp_path / "a.png")


def test_sixteen_bit_colour_images_are_refused_though_pillow_takes_them_for_eight(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert Image.open(path).mode == "RGB"
    with pytest.raises(UserError, match=r"a\.png has more than 8 bits a channel: convert it to 8-bit RGB"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"is animated \(3 frames\): save the frame"):
        load_image(path)


def test_of_a_photo_with_a_preview_the_photo_is_read(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 8), "red").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 2), "blue")])
    assert Image.open(path).n_frames == 2
    red, green, blue = load_image(path).float().mean((1, 2))
    assert red > 250 > 5 > max(green, blue)


RED, HALF_GREY = [255, 0, 0], [128, 128, 128]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 128, HALF_GREY),
        ("LA", (128, 255), HALF_GREY),
        ("LA", (0, 127), HALF_GREY),
        ("RGBA", (255, 0, 0, 255), RED),
        ("P", 1, RED),
    ],
)
def test_other_kinds_of_png_become_rgb_on_white(tmp_path, mode, colour, expected):
    picture = Image.new(mode, (4, 4), colour)
    if mode == "P":
        picture.putpalette([0, 0, 255, *RED])
    picture.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 1, 2].tolist() == expected


@pytest.mark.parametrize(("mode", "clear"), [("P", 1), ("L", 7), ("RGB", (1, 2, 3))])
def test_the_colour_that_a_png_declares_transparent_becomes_white(tmp_path, mode, clear):
    picture = Image.new(mode, (2, 1), clear)
    if mode == "P":
        picture.putpalette([0, 0, 255, *RED])
    picture.putpixel((1, 0), 0 if mode != "RGB" else (0, 0, 0))
    picture.save(tmp_path / "a.png", transparency=clear)
    image = load_image(tmp_path / "a.png")
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, 1].tolist() == ([0, 0, 255] if mode == "P" else [0, 0, 0])


def test_cmyk_photos_become_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert load_image(tmp_path / "a.jpg")[:, 8, 8].tolist() == pytest.approx(RED, abs=4)


@pytest.mark.parametrize("suffix", [".jpg", ".tiff", ".webp", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_camera_says(tmp_path, orientation, suffix):
    """The eight orientations of EXIF 2.3, table 6: where the stored top left corner belongs."""
    corners = [(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)]
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a{suffix}", exif=exif, quality=100)
    image = load_image(tmp_path / f"a{suffix}")
    shape = (3, 16, 32) if orientation < 5 else (3, 32, 16)
    assert image.shape == shape
    assert image_size(tmp_path / f"a{suffix}") == (shape[2], shape[1])
    row, column = corners[orientation - 1]
    assert image[:, row, column].min() > 200
    assert image[:, -1 - row, -1 - column].max() < 50


def test_an_image_of_more_pixels_than_pillow_lets_pass_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path, smooth_images(1, size=64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"00000\.png is not a readable image .*4096 pixels"):
        load_image(tmp_path / "00000.png")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, kind, data):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    Image.fromarray(smooth_images(1, size=24)[0].permute(1, 2, 0).numpy()).save(buffer, kind, **options)
    content = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
    places = data.draw(st.lists(st.integers(0, min(len(content), 150) - 1), max_size=4))
    content[places] = data.draw(st.lists(st.integers(0, 255), min_size=len(places), max_size=len(places)))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))].tobytes())
    for read in (load_image, image_size):
        with contextlib.suppress(UserError):  # any other exception fails
            read(path)


@pytest.mark.parametrize("lacking", ["fp", "quantized"])
def test_a_missing_counterpart_is_named(tmp_path, lacking):
    for name in ("fp", "quantized"):
        write_images(tmp_path / name, smooth_images(3))
    (tmp_path / lacking / "00001.png").unlink()
    with pytest.raises(UserError, match=rf"{lacking} lacks 1 of 3 images \(00001\.png\)"):
        ImagePairs.open(tmp_path / "fp", tmp_path / "quantized")


def test_pairs_of_different_size_are_refused(tmp_path):
    write_images(tmp_path / "fp", smooth_images(1, size=32))
    write_images(tmp_path / "quantized", smooth_images(1, size=16))
    with pytest.raises(UserError, match=r"16x16 but .* is 32x32"):
        _ = ImagePairs.open(tmp_path / "fp", tmp_path / "quantized").sizes


def test_batches_are_runs_of_one_size_and_load_bit_equal(tmp_path):
    images = [image for size in (8, 16, 8) for image in smooth_images(3, size=size)]
    for index, image in enumerate(images):
        for side, shown in (("fp", image), ("quantized", 255 - image)):
            save_image(shown, tmp_path / side / f"{index:05d}.png")
    pairs = ImagePairs.open(tmp_path / "fp", tmp_path / "quantized")
    batches = pairs.batches(pixels=2 * 8 * 8)
    assert batches == [range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 8), range(8, 9)]
    for index, image in enumerate(images):
        reference, quantized = pairs.load(index)
        assert torch.equal(reference, image)
        assert torch.equal(quantized, 255 - image)


def test_the_hundred_thousandth_image_comes_after_those_before_it(tmp_path):
    first, *images = smooth_images(3, size=8)
    for name in ("99999.png", "100000.png"):
        save_image(images.pop(0), tmp_path / name)
    save_image(first, tmp_path / "cover.png")
    assert [path.name for path in generated_images(tmp_path)] == ["99999.png", "100000.png", "cover.png"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_folder_without_images_is_refused(tmp_path, make):
    make(tmp_path / "real")
    with pytest.raises(UserError, match="real"):
        any_images(tmp_path / "real")


def test_real_images_are_found_in_subfolders_and_unfinished_files_are_not(tmp_path):
    write_images(tmp_path / "a" / "b", smooth_images(2))
    (tmp_path / "a" / ".00002.1.png").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in any_images(tmp_path)] == ["00000.png", "00001.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_numbers_in_names_sort_as_numbers(tmp_path):
    names = ["2.png", "10.png", "img1-10.png", "img2.png", "IMG3.png", "img10.png"]
    assert [path.name for path in generated_images(touch(tmp_path, *reversed(names)))] == names


@pytest.mark.parametrize("suffixes", [(".PNG", ".png"), (".jpg", ".JPEG"), (".webp", ".WebP"), (".tif", ".TIFF")])
def test_images_of_any_kind_pair_up_however_their_suffix_is_spelled(tmp_path, suffixes):
    fp, quantized = (touch(tmp_path / suffix, f"a2{suffix}", f"a10{suffix}") for suffix in suffixes)
    pairs = ImagePairs.open(fp, quantized)
    assert [(one.stem, other.stem) for one, other in pairs.paths] == [("a2", "a2"), ("a10", "a10")]
    assert pairs.sizes == [(8, 8)] * 2


def test_another_kind_is_no_twin(tmp_path):
    fp, quantized = touch(tmp_path / "fp", "a.png"), touch(tmp_path / "q", "a.jpg")
    with pytest.raises(UserError, match=r"q lacks 1 of 1 images \(a\.png\); it holds \.jpg files"):
        ImagePairs.open(fp, quantized)


def test_pictures_of_ones_own_beside_generated_images_are_left_alone(tmp_path):
    folder = touch(tmp_path, "00000.png", "00001.png", "photo.jpg")
    assert [path.name for path in generated_images(folder)] == ["00000.png", "00001.png"]
    with pytest.raises(UserError, match=r"several kinds \(.*1 \.jpg.*\): keep each kind"):
        check_one_kind(folder)


def test_two_spellings_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds both a\.JPG and a\.jpeg|holds both a\.jpeg and a\.JPG"):
        generated_images(touch(tmp_path, "a.jpeg", "a.JPG"))


def test_links_to_folders_are_followed_once(tmp_path):
    real, elsewhere = touch(tmp_path / "real", "1.png"), touch(tmp_path / "elsewhere", "2.JPEG", "3.tif")
    (real / "train").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(real)
    (real / "broken").symlink_to(tmp_path / "nowhere")
    touch(real / ".hidden", "4.png")
    assert [path.relative_to(real).as_posix() for path in any_images(real)] == ["1.png", "train/2.JPEG", "train/3.tif"]


def test_two_hundred_thousand_images_are_in_order_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_files", lambda folder: (folder / f"{n}.png" for n in range(200_000, -1, -1)))
    began = time.perf_counter()
    found = generated_images(tmp_path)
    assert [found[2].name, found[-1].name] == ["2.png", "200000.png"]
    assert time.perf_counter() - began < 15
