"""A PNG is trusted only when it is whole, and is read no more often than it changes."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dmquant.evaluation.generate import image_requests, pruned_and_missing
from dmquant.evaluation.png import read_key, read_prompt
from dmquant.host.text import escaped


def write(path: Path, key: str = "key", prompt: str = "grüne, häuser 🏠", format: str = "PNG") -> Path:
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", prompt)
    about.add_text("key", key)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format, pnginfo=about)
    return path


def test_an_image_says_which_key_and_prompt_made_it(tmp_path):
    path = write(tmp_path / "00000.png")
    assert read_key(path) == "key"
    assert read_prompt(path) == "grüne, häuser 🏠"


def test_a_prompt_with_control_characters_is_stored_without_them_and_read_with_them(tmp_path):
    prompt = "a\x1b[31m cat \u202e\\u0041"
    path = write(tmp_path / "00000.png", prompt=escaped(prompt))
    with Image.open(path) as image:
        assert image.info["prompt"] == "a\\u001b[31m cat \\u202e\\u005cu0041"
    assert read_prompt(path) == prompt


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = write(tmp_path / "00000.png")
    whole = path.read_bytes()
    for place in range(len(whole)):
        for damaged in (whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :], whole[:place]):
            path.write_bytes(damaged)
            assert read_key(path) is None, place


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_anything_else_has_no_key(tmp_path, size):
    path = tmp_path / "00000.png"
    assert read_key(path) is None
    path.mkdir()
    assert read_key(path) is None
    other = write(tmp_path / "00001.png", format="JPEG")
    assert read_key(other) is None
    other.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(size))
    assert read_key(other) is None


def test_an_image_that_has_not_changed_is_read_once_and_one_that_has_is_read_again(tmp_path, monkeypatch):
    requests = image_requests(["a", "b"], 0, "settings")
    for request in requests:
        os.utime(write(tmp_path / request.name, request.key), (1, 1))
    opened = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or real(path))
    monkeypatch.setattr(Image, "open", lambda *given: pytest.fail("an image was decoded"))
    for _ in range(3):
        assert not pruned_and_missing(tmp_path, requests)
    assert opened == [request.name for request in requests]
    damaged = tmp_path / requests[1].name
    damaged.write_bytes(real(damaged)[:-1] + b"?")
    assert pruned_and_missing(tmp_path, requests) == [requests[1]]
