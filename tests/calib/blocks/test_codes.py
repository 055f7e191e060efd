"""Codes of finished units: whole and of this calibration, or as good as absent."""

import random
import signal
import sys

import pytest
import torch

from dmquant.calib.blocks.codes import CodesFolder
from dmquant.errors import UserError

TENSORS = {"a.codes": torch.arange(12, dtype=torch.uint8).view(3, 4), "a.scale": torch.ones(3, 1).bfloat16()}
FACTS = {"formats": {"a": "fp4_e2m1"}, "seconds": 1.5}


@pytest.fixture
def folder(tmp_path):
    codes = CodesFolder(tmp_path / "blocks", "key")
    codes.save(3, "block", TENSORS, FACTS)
    return codes


def test_what_is_saved_is_loaded(folder):
    tensors, facts = folder.load(3, "block")
    assert facts == FACTS
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert tensors.keys() == TENSORS.keys()
    assert {path.name for path in folder.path.iterdir()} == {"003.safetensors", "003.json"}


def test_other_units_and_other_calibrations_find_nothing(folder):
    assert folder.load(2, "block") is None
    assert folder.load(3, "other") is None
    assert CodesFolder(folder.path, "other key").load(3, "block") is None


@pytest.mark.parametrize("damaged", ["003.safetensors", "003.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damage_is_found(folder, damaged, damage):
    path = folder.path / damaged
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[0] ^= 0xFF
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    assert folder.load(3, "block") is None
    folder.save(3, "block", TENSORS, FACTS)
    assert folder.load(3, "block") is not None


@pytest.mark.parametrize("record", ["{}", "[]", "null", '{"key": "key"}'])
def test_a_record_of_something_else_is_no_record(folder, record):
    (folder.path / "003.json").write_text(record)
    assert folder.load(3, "block") is None


def test_codes_without_their_record_are_not_taken(folder):
    """Killed between the two files: the new codes lie beside the old record."""
    folder.save(3, "block", {"a.codes": TENSORS["a.codes"] + 1}, FACTS)
    record = (folder.path / "003.json").read_text()
    folder.save(3, "block", TENSORS, FACTS)
    (folder.path / "003.json").write_text(record)
    assert folder.load(3, "block") is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "000.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        CodesFolder(tmp_path, "key").save(0, "block", TENSORS, FACTS)


def test_facts_that_were_changed_are_noticed(folder):
    record = folder.path / "003.json"
    text = record.read_text()
    for old, new in (("fp4_e2m1", "fp4_e1m2"), ('"a"', '"b"'), ("facts", "fact5")):
        assert old in text
        record.write_text(text.replace(old, new))
        assert folder.load(3, "block") is None
    record.write_text(text)
    assert folder.load(3, "block")[1] == FACTS


@pytest.mark.skipif(sys.platform == "win32", reason="no timer")
def test_an_interrupt_while_loading_stays_one(tmp_path):
    """In torch.asarray, which safetensors' load_file calls, a KeyboardInterrupt is dropped for a ValueError."""
    codes, draw = CodesFolder(tmp_path, "key"), random.Random(0)
    codes.save(0, "block", {str(number): torch.zeros(16) for number in range(3000)}, FACTS)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    outcomes = set()
    try:
        for _ in range(100):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.05))
                outcomes.add(codes.load(0, "block") is not None)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                outcomes.add(KeyboardInterrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert KeyboardInterrupt in outcomes
    assert False not in outcomes
