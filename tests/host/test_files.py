"""Files that are written whole, line by line, and told apart by hash."""

import errno
import hashlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.errors import UserError
from dmquant.host.files import (
    append_line,
    as_umask_says,
    fingerprint,
    json_sha256,
    replacing,
    sealed_json,
    sha256,
    take_seal,
)


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


def test_hashes_that_lie_in_folders_of_earlier_versions_stay_what_they_are():
    # Keys of images, of calibration data and of stages: a new value would make all of them again.
    value = {"b": 1, "a": ["x", 0.5]}
    assert json_sha256(value) == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    assert fingerprint(a=1) == hashlib.sha256(b'{"a":1}').hexdigest()[:32]


@given(st.dictionaries(st.text().filter("sha256".__ne__), st.integers() | st.lists(st.text()), min_size=1, max_size=4))
def test_a_sealed_object_is_as_it_was_until_something_in_it_changes(content):
    written = json.loads(json.dumps(sealed_json(content)))
    changed = written | {next(iter(content)): "another"}
    assert take_seal(written) is True
    assert written == content
    assert take_seal(written) is None
    assert take_seal(changed) is False


@given(st.dictionaries(st.text(), st.integers() | st.lists(st.text()), max_size=4))
def test_equal_settings_in_any_order_have_one_fingerprint(settings):
    again = dict(reversed(settings.items()))
    assert json_sha256(settings) == json_sha256(again)


def test_lines_are_added_and_half_a_line_spoils_none_after_it(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "first")
    append_line(path, "zweite, ü")
    assert path.read_text(encoding="utf-8") == "first\nzweite, ü\n"
    path.write_bytes(path.read_bytes()[:-3])
    append_line(path, "third")
    assert path.read_bytes().decode(errors="replace").splitlines()[-1] == "third"


def test_a_line_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot write") as raised:
        append_line(tmp_path / "absent" / "lines", "first")
    assert raised.value.__cause__.errno == errno.ENOENT


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o027])
def test_files_have_the_mode_that_the_umask_says_whoever_writes_them(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a" / "x.safetensors") as temporary:
            temporary.touch(0o600)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "y").touch(0o600)
        as_umask_says(tmp_path / "b")
    finally:
        assert os.umask(before) == mask
    for path in (tmp_path / "a" / "x.safetensors", tmp_path / "b" / "y"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
