"""Compile for this machine: what lacks, and libraries made of the C++ files of this folder."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import filelock

from dmquant.errors import UserError
from dmquant.host import caches
from dmquant.host.files import sha256, write_text

# No -ffast-math, and no multiplication fused with an addition: results are those of the eager code, bit for bit.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
LONGEST = 300  # seconds that a compiler may take
_hung: set[str] = set()  # compilers that took longer, which are not asked again


@functools.cache
def missing_to_compile() -> str | None:
    """A requirement that torch.compile lacks on the CPU, and how to get it; None where it lacks nothing."""
    if missing := missing_compiler():
        return missing
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers: install python3-dev, or the package that has Python.h"
    return None


@functools.cache
def missing_compiler() -> str | None:
    """The compiler that `library` lacks, and how to get it; None where there is one."""
    return None if _compiler() else "a C++ compiler: install g++ or clang"


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.cpp of this folder; None, with a note in the log, where they cannot be compiled.

    They are compiled once for a machine, compiler and source, into the folder of caches.
    """
    if (compiler := _compiler()) is None or (made := _made(name)) is None:
        return _note(f"nothing is compiled here, for want of {missing_compiler() or 'a home folder to keep it in'}")
    if compiler in _hung:
        return None
    try:
        if not _is_whole(made):
            _compile(compiler, _source(name), made)
        return ctypes.CDLL(str(made))
    except (OSError, UserError, NotImplementedError, subprocess.SubprocessError) as error:
        if isinstance(error, subprocess.TimeoutExpired):
            _hung.add(compiler)
        if (why := getattr(error, "strerror", None)) or isinstance(error, NotImplementedError):
            return _note(f"nothing is compiled here, since {made.parent} cannot be used: {why or error}")
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        return _note(f"{name}.cpp is not compiled here: {said}")


def is_compiled(name: str) -> bool:
    """Whether `library` has no compiling to do."""
    return (made := _made(name)) is not None and _is_whole(made)


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


@functools.cache
def _made(name: str) -> Path | None:
    """Where the library of this source, compiler and machine is kept; None without a compiler or a place to keep it."""
    if (compiler := _compiler()) is None or (folder := caches.folder()) is None:
        return None
    about = (_source(name).read_text(encoding="utf-8"), compiler, _version(compiler), *FLAGS, *processor())
    return folder / "compiled" / f"{name}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"


def _compile(compiler: str, source: Path, made: Path) -> None:
    """Compile beside `made` and move there: another process waits, and finds all of it or nothing."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(made.with_suffix(".lock"), timeout=LONGEST):
        if _is_whole(made):
            return
        with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-") as scratch:
            result = Path(scratch, made.name)
            command = [compiler, *FLAGS, str(source), "-o", str(result)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST, cwd=scratch)
            write_text(_seal(made), sha256(result))
            os.replace(result, made)


def _seal(made: Path) -> Path:
    """Where the hash of a library is kept: one that lost its end to a crash of the machine would end the process."""
    return made.with_suffix(".sha256")


def _is_whole(made: Path) -> bool:
    """Whether a library is there and what the compiler made."""
    try:
        return sha256(made) == _seal(made).read_text(encoding="ascii")
    except (OSError, UserError, ValueError):
        return False


@functools.cache  # once a process
def _note(what: str) -> None:
    logging.getLogger("dmquant").warning(f"{what}; slower code does the work")


@functools.cache
def _compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return None


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=LONGEST).stdout


@functools.cache
def processor() -> tuple[str, ...]:
    """What `-march=native` depends on: another machine may share the folder of caches."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return (platform.machine(), *sorted({line for line in lines if line.split("\t")[0].strip() in kinds}))
