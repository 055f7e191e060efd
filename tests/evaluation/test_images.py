import errno
import os

import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.images import ImagePairs, any_images, load_image, save_image
from dmquant.files import replacing, write_text
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


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        load_image(tmp_path / "a.png")


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
        list(ImagePairs.open(tmp_path / "fp", tmp_path / "quantized"))


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
