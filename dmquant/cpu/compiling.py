"""Whether this machine can compile, and C++ sources of this folder as libraries, built once a machine."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

# No contraction: a product and a sum are rounded one after the other, as torch's own operations do it.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
LONGEST_BUILD = 300  # seconds


@functools.cache
def missing_to_compile() -> str | None:
    """A requirement that torch.compile lacks on the CPU, and how to get it; None where it lacks nothing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "a C++ compiler: install g++ or clang"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers: install python3-dev, or the package that has Python.h"
    return None


def is_built(name: str) -> bool:
    """Whether `library` finds what an earlier process built."""
    return _kept(name).is_file()


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `<name>.cpp` in this folder, compiled for this machine's processor by the first who asks.

    It is kept in the user's cache, under the hash of all that it was made from. None, after one note, where it cannot
    be had: without a compiler, or where that fails.
    """
    kept = _kept(name)
    with contextlib.suppress(OSError):  # not there, or damaged
        return ctypes.CDLL(str(kept))
    try:
        return _build(name, kept)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logging.getLogger("dmquant").warning(f"{name} runs in its slower form: {said.strip().splitlines()[-1]}")
        return None


def _build(name: str, kept: Path) -> ctypes.CDLL:
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next(filter(None, map(shutil.which, filter(None, compilers))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler: install g++ or clang")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, kept.name)
        command = [compiler, *FLAGS, str(_source(name)), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, unfinished)
            unfinished.replace(kept)  # whole at once: other processes look for it, too
            return ctypes.CDLL(str(kept))
        except OSError:  # no place to keep it: it serves this process alone
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return ctypes.CDLL(str(made))


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


@functools.cache
def _kept(name: str) -> Path:
    """Where the library of this source, these flags and this processor is kept."""
    made_from = f"{_source(name).read_text(encoding='utf-8')} {FLAGS} {platform.machine()} {_processor()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dmquant")
    return folder / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"


@functools.cache
def _processor() -> str:
    """What the compiled code depends on: the processor's model and what it can do."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    return " ".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*", facts, re.MULTILINE))))
