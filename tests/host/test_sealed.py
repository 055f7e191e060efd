"""Sealed files: what was written comes back, and a file with any byte changed does not."""

import os
import random

import pytest
import torch

from dmquant.errors import UserError
from dmquant.host.sealed import load_sealed, save_sealed, sealed_about

TENSORS = {"seal": torch.arange(12).view(3, 4), "b": torch.ones(5).bfloat16(), "none": torch.empty(0, 3)}
ABOUT = {"seal": 'a "seal":"' + "0" * 64, "numbers": [1, 2.5, None]}


@pytest.fixture
def path(tmp_path):
    save_sealed(tmp_path / "folder" / "file.safetensors", TENSORS, ABOUT)
    return tmp_path / "folder" / "file.safetensors"


def test_what_was_written_comes_back(path):
    tensors, about = load_sealed(path)
    assert about == sealed_about(path) == ABOUT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_same_content_is_the_same_bytes(path, tmp_path):
    save_sealed(tmp_path / "again.safetensors", TENSORS, ABOUT)
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_any_flipped_bit_and_any_cut_is_noticed(path):
    whole, draw = path.read_bytes(), random.Random(0)
    for position in (*range(8), *(draw.randrange(len(whole)) for _ in range(200))):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert sealed_about(path) is None, position
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert load_sealed(path) is None
    path.write_bytes(whole + b"0")
    assert load_sealed(path) is None


def test_what_is_no_sealed_file_is_none(tmp_path):
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes((2).to_bytes(8, "little") + b"{}")
    os.mkfifo(tmp_path / "fifo.safetensors")
    for name in ("plain", "fifo", "absent"):
        assert load_sealed(tmp_path / f"{name}.safetensors") is None
    assert load_sealed(tmp_path) is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_sealed(tmp_path / "file.safetensors", TENSORS, ABOUT)
