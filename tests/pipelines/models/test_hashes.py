"""Hashes that tell one model from another."""

import hashlib

from dmquant.pipelines.models.hashes import pipeline_hashes, sha256


def make(folder):
    for name in ("model_index.json", "scheduler/config.json", "transformer/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "transformer" / "model.safetensors").write_bytes(b"abc")
    (folder / "README.md").write_text("about")
    return folder


def test_sha256_of_a_file_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_large_files_are_read_in_pieces_that_add_up(tmp_path):
    content = bytes(range(256)) * 40_000
    (tmp_path / "large").write_bytes(content)
    pieces = []
    assert sha256(tmp_path / "large", pieces.append) == hashlib.sha256(content).hexdigest()
    assert len(pieces) > 1
    assert sum(pieces) == len(content)


def test_every_file_that_makes_the_model_counts_and_no_other(tmp_path):
    folder = make(tmp_path)
    before = pipeline_hashes(folder, "transformer")
    assert len(before) == 4
    (folder / "README.md").write_text("something else")
    assert pipeline_hashes(folder, "transformer") == before
    (folder / "scheduler" / "config.json").write_text('{"steps": 1}')
    assert pipeline_hashes(folder, "transformer") != before


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    pipeline_hashes(make(tmp_path), "transformer", lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == 2 + 2 + 2 + 3
