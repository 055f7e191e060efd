"""How much memory calibration may take, and how much of it learning takes."""

import ctypes
import gc
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dmquant.calib.outputs import nbytes
from dmquant.calib.units import Block, tasks_of
from dmquant.errors import UsageError
from dmquant.recipe import Learning

STATE = 80
"""Bytes a weight while its rounding is learned, measured: grid, bounds, V with gradient and moments, the graph."""
FALLBACK = 4_000_000_000
BACKWARD = 2  # what autograd keeps, and gradients of about the same size


def default_budget() -> int:
    """Half of the memory that is free, or FALLBACK where the system does not tell."""
    try:
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return FALLBACK
    return int(free.group(1)) * 1024 // 2


def return_freed_memory() -> None:
    """Give memory that is free again back to the system: glibc keeps it, and more of it with every block."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def check_budget(total: int, backbone: nn.Module, blocks: Sequence[Block], learning: Learning) -> int:
    """Bytes that learning the largest unit takes; UsageError where that is more than `total`."""
    needed = {block.name: _needed(backbone, blocks, number, learning) for number, block in enumerate(blocks)}
    largest = max(needed, key=needed.get)
    if needed[largest] > total:
        least = _megabytes(needed[largest])
        raise UsageError(
            f"a memory budget of {_megabytes(total)} is too small: {largest} alone takes {least}; "
            f"use --memory-budget {least.replace(' ', '')} or more, or a smaller learning.batch_size"
        )
    return needed[largest]


def _needed(backbone: nn.Module, blocks: Sequence[Block], number: int, learning: Learning) -> int:
    by_name = {block.name: block for block in blocks}
    most = 0
    for task in tasks_of(blocks, number, learning):
        weights = sum(backbone.get_submodule(name).weight.numel() for name in task.layers)
        members = [by_name[name] for name in task.blocks]
        activations = sum(block.saved_bytes * BACKWARD + 2 * nbytes(block.output) for block in members)
        most = max(most, STATE * weights + activations * learning.batch_size)
    return most


def _megabytes(count: int) -> str:
    return f"{-(-count // 1_000_000)} MB"
