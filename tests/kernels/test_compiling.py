"""Libraries compiled for this machine: kept whole or compiled anew, and one note where that cannot be."""

import logging
import subprocess

import pytest

from dmquant.cpu import compiling
from dmquant.host import caches

needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="no C++ compiler")
MEMORIES = compiling.library, compiling._made, compiling._note


@pytest.fixture
def library(monkeypatch, tmp_path):
    """`compiling.library` in a process that has asked for none, of sources of one function."""

    def source(name):
        (path := tmp_path / f"{name}.cpp").write_text(f'extern "C" int {name}() {{ return 7; }}')
        return path

    def fresh(name):
        for memory in MEMORIES:
            memory.cache_clear()
        return compiling.library(name)

    monkeypatch.setattr(compiling, "_source", source)
    monkeypatch.setattr(compiling, "_hung", set())
    monkeypatch.setattr(compiling, "FLAGS", ("-shared", "-fPIC"))
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "caches"))
    yield fresh
    for memory in MEMORIES:
        memory.cache_clear()


@needs_compiler
@pytest.mark.parametrize("left", [0, 100, 5000])
def test_a_library_that_lost_its_end_is_compiled_anew(library, tmp_path, left):
    """Loading what is left of it would end the process, or none would be loaded ever again."""
    assert library("seven").seven() == 7
    (made,) = tmp_path.glob("caches/compiled/seven*.so")
    whole = made.read_bytes()
    assert left < len(whole)
    made.unlink()  # this process has it in its memory
    made.write_bytes(whole[:left])
    assert not compiling.is_compiled("seven")
    assert library("seven").seven() == 7
    assert made.stat().st_size == len(whole)
    assert compiling.is_compiled("seven")


@needs_compiler
def test_the_folder_of_caches_may_be_relative(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(caches.VARIABLE, "here")
    assert library("seven").seven() == 7
    assert list(tmp_path.glob("here/compiled/seven*.so"))


@needs_compiler
def test_a_folder_that_cannot_be_used_is_one_note_for_all_libraries(library, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert library("seven") is None
        assert compiling.library("eight") is None
    (record,) = caplog.records
    assert "cannot be used: Not a directory; slower code does the work" in record.message


@needs_compiler
def test_a_compiler_that_hangs_is_asked_once(library, monkeypatch, caplog):
    asked = []

    def hang(command, **more):
        asked.append(command)
        raise subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(compiling, "_version", lambda compiler: "")
    monkeypatch.setattr(subprocess, "run", hang)
    with caplog.at_level(logging.WARNING):
        assert library("seven") is None
        assert compiling.library("eight") is None
    assert len(asked) == len(caplog.records) == 1
