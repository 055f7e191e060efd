"""checksums.json: what it says of a folder, and every way in which a folder is not as it says."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.errors import UserError
from dmquant.host import checksums, weight_file

WEIGHTS = "unet/model.safetensors"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "README.md").write_text("a card\n")
    (tmp_path / "unet/config.json").write_text("{}\n")
    tensors = {"conv.qweight": torch.arange(64, dtype=torch.uint8), "conv.scale": torch.ones(4), "empty": torch.ones(0)}
    save_file(tensors, tmp_path / WEIGHTS)
    checksums.write(tmp_path)
    return tmp_path


def lines(folder):
    try:
        return checksums.faults(folder)
    except UserError as error:
        return [str(error)]


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_folder_is_as_it_was_recorded(folder):
    assert checksums.faults(folder) == []
    record = checksums.recorded(folder)
    assert record.keys() == {"README.md", "unet/config.json", WEIGHTS}
    assert record[WEIGHTS]["tensors"].keys() == {"conv.qweight", "conv.scale", "empty"}


def test_every_flipped_bit_is_noticed_in_every_file(folder):
    """One bit of every ninth byte, which are all eight bits of some; of tensors the name is given."""
    tensors = weight_file.header(folder / WEIGHTS)
    for name in (*checksums.recorded(folder), checksums.NAME):
        path = folder / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 9):
            flip(path, at, at % 8)
            found = lines(folder)
            of_tensor = [tensor for tensor, each in tensors.items() if name == WEIGHTS and each.begin <= at < each.end]
            assert len(found) == 1, (name, at)
            assert path.name in found[0]
            assert "\n" not in found[0]
            assert not of_tensor or found[0] == f"{name} is not what was saved: tensor '{of_tensor[0]}'"
            path.write_bytes(whole)
    assert checksums.faults(folder) == []


def test_what_is_missing_additional_or_of_another_size_is_named(folder):
    (folder / "unet/config.json").unlink()
    (folder / "unet/more.bin").touch()
    (folder / "README.md").write_text("another card\n")
    assert checksums.faults(folder) == [
        "README.md is not what was saved: 13 bytes, not 7",
        "unet/config.json is missing",
        "unet/more.bin was not saved with the model",
    ]
    assert checksums.faults(folder, lambda name: name == WEIGHTS) == []


def test_another_dtype_of_the_same_size_is_a_fault_of_the_header(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    line = "is not what was saved: the names, dtypes and shapes of its tensors"
    assert checksums.faults(folder) == [f"{WEIGHTS} {line}"]
    assert checksums.outline_fault(path) == line


def test_size_and_header_are_checked_without_a_look_at_the_weights(folder, tmp_path):
    path = folder / WEIGHTS
    assert checksums.outline_fault(path) is None
    flip(path, path.stat().st_size - 1)
    assert checksums.outline_fault(path) is None
    save_file(load_file(path) | {"more": torch.ones(1)}, path)
    assert "bytes, not" in checksums.outline_fault(path)
    save_file({}, folder / "unet/other.safetensors")
    assert checksums.outline_fault(folder / "unet/other.safetensors") == "was not saved with the model"
    (folder / checksums.NAME).unlink()
    assert checksums.outline_fault(path) is None


def test_files_that_were_replaced_are_recorded_anew(folder):
    (folder / "README.md").write_text("a card with scores\n")
    checksums.rewritten(folder, ["README.md"])
    assert checksums.faults(folder) == []
    (folder / checksums.NAME).unlink()
    checksums.rewritten(folder, ["README.md"])
    assert not (folder / checksums.NAME).exists()


def test_hidden_files_do_not_count(folder):
    (folder / ".git").mkdir()
    (folder / ".git/config").touch()
    (folder / ".gitattributes").touch()
    assert checksums.faults(folder) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"version": 99}', "later dmquant"),
        (checksums._text({"../up": {"size": 1, "sha256": ""}}), "is damaged"),
        (checksums._text({"README.md": {"size": "1", "sha256": ""}}), "is damaged"),
        (checksums._text({"README.md": {"size": 1}}), "is damaged"),
    ],
)
def test_a_record_that_is_none_is_said_in_one_line(folder, content, said):
    (folder / checksums.NAME).write_text(content)
    with pytest.raises(UserError, match=rf"^\S+{checksums.NAME} .*{said}.*$"):
        checksums.faults(folder)


def test_the_record_of_a_large_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(checksums, "LARGEST", 100)
    with pytest.raises(UserError, match="too large"):
        checksums.recorded(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
def test_what_is_no_regular_file_is_not_opened(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(UserError, match="is no regular file"):
        checksums.faults(folder)
    (folder / checksums.NAME).unlink()
    (folder / checksums.NAME).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is no regular file"):
        checksums.recorded(folder)


def test_several_names_of_one_file_are_read_once(folder, monkeypatch):
    os.link(folder / WEIGHTS, folder / "unet/twin.safetensors")
    read = []
    monkeypatch.setattr(checksums, "_sha256", lambda path, begin, end: read.append(path) or "")
    checksums.write(folder)
    assert len({path for path in read if path.suffix == ".safetensors"}) <= 1
    record = checksums.recorded(folder)
    assert record["unet/twin.safetensors"] == record[WEIGHTS]


def test_the_record_is_json_that_other_programs_read(folder):
    content = json.loads((folder / checksums.NAME).read_text())
    assert content["version"] == 1
    assert set(content) == {"version", "sha256", "files"}
