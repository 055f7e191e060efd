"""Whether this machine can compile."""

import functools
import sysconfig
from pathlib import Path


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
