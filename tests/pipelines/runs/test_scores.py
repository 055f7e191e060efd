"""What scores depend on, and which of them are computed anew."""

import os
from types import SimpleNamespace

from dmquant.host import hashes
from dmquant.pipelines.runs.scores import scores_key
from tests.evaluation.conftest import smooth_images, write_images


def test_a_real_image_of_the_same_size_and_another_content_makes_other_scores(tmp_path):
    real = write_images(tmp_path / "real", smooth_images(3))
    settings = SimpleNamespace(real=real)
    before = scores_key({"fp": ["a"]}, settings)
    assert scores_key({"fp": ["a"]}, settings) == before
    path = real / "00001.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert scores_key({"fp": ["a"]}, settings) != before


def test_real_images_are_hashed_once_as_long_as_they_stay_the_same(tmp_path, monkeypatch):
    real = write_images(tmp_path / "real", smooth_images(3))
    for path in real.iterdir():
        os.utime(path, (1, 1))
    hashed = []
    whole = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path, *given: hashed.append(path.name) or whole(path, *given))
    keys = {scores_key({}, SimpleNamespace(real=real)) for _ in range(3)}
    assert len(keys) == 1
    assert sorted(hashed) == ["00000.png", "00001.png", "00002.png"]
    assert scores_key({}, SimpleNamespace(real=None)) not in keys
