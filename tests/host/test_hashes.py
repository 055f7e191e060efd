"""A file that was hashed is not read again while it is the same; one that changed is."""

import json
import os

import pytest

from dmquant.host import hashes
from dmquant.host.files import sha256
from dmquant.host.hashes import sha256_once


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that has not changed for a while, hashed by a process that knows nothing yet."""
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 4)
    monkeypatch.setattr(hashes, "_in_this_process", {})
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    age(path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files that were read."""
    read = []
    monkeypatch.setattr(hashes, "sha256", lambda path, on_bytes: (read.append(path.name), sha256(path, on_bytes))[1])
    return read


def age(path, seconds=60):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def another_process():
    hashes._in_this_process.clear()


def test_a_file_is_read_once_by_all_processes(file, reads):
    assert sha256_once(file) == sha256(file)
    another_process()
    pieces = []
    assert sha256_once(file, pieces.append) == sha256(file)
    assert (reads, sum(pieces)) == (["weights"], file.stat().st_size)


def test_another_name_of_a_file_is_not_read_again(file, reads):
    os.link(file, file.with_name("link"))
    assert sha256_once(file) == sha256_once(file.with_name("link"))
    assert reads == ["weights"]


@pytest.mark.parametrize("aged", [False, True])
def test_a_file_that_changed_is_read_again_though_its_size_is_the_same(file, reads, aged):
    before = sha256_once(file)
    file.write_bytes(b"other weight")
    if aged:
        age(file, 30)
    assert sha256_once(file) == sha256(file) != before
    another_process()
    assert sha256_once(file) == sha256(file)


def test_a_file_in_the_place_of_another_with_its_size_and_time_is_read(file, reads):
    before, stat = sha256_once(file), file.stat()
    other = file.with_name("other")
    other.write_bytes(b"other weight")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert sha256_once(file) == sha256(file) != before


def test_a_file_that_may_still_change_without_showing_it_is_not_remembered(file, reads):
    file.write_bytes(b"written now.")
    sha256_once(file)
    sha256_once(file)
    assert reads == ["weights", "weights"]


@pytest.mark.parametrize("content", ["", "[]", '{"half', '{"PATH": [1]}'])
def test_a_damaged_memory_is_none(file, content, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text(content.replace("PATH", str(file)))
    assert sha256_once(file) == sha256(file)
    assert str(file) in json.loads((tmp_path / "cache" / "hashes.json").read_text())


def test_a_memory_that_cannot_be_written_is_none(file, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path / "a file"))
    assert sha256_once(file) == sha256(file)


def test_the_memory_does_not_grow_for_ever(file, monkeypatch, tmp_path):
    monkeypatch.setattr(hashes, "MOST", 2)
    for name in ("first", "second", "third"):
        path = file.with_name(name)
        path.write_bytes(b"weights of " + name.encode())
        age(path)
        sha256_once(path)
    known = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    assert [place.rpartition("/")[2] for place in known] == ["second", "third"]
