"""Memory: how much is free, giving it back, and the peak of one stage of work."""

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dmquant.host.units import size_text

FALLBACK = 4_000_000_000
_CLEAR_PEAK = "5"  # proc(5), /proc/pid/clear_refs: reset the peak resident set size to the current one


def default_budget(device: torch.device | None = None) -> int:
    """Half of the memory that is free, of a GPU's where `device` is one; FALLBACK where the system does not tell."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
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


@contextlib.contextmanager
def new_garbage_only() -> Iterator[None]:
    """Until the block ends, collect garbage among what is made in it alone: what libraries are made of is a million
    objects, which take a third of a second to look at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class PeakMemory:
    """Bytes at the highest point so far, what they count, and how to read them."""

    read: Callable[[], int]
    what: str
    bytes: int = 0

    def update(self) -> None:
        """Read the highest point since the block began."""
        self.bytes = self.read()

    def in_words(self) -> str:
        """As in "602.4 MB, resident memory of the process"."""
        return f"{size_text(self.bytes)}, {self.what}"


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the block; the yielded record is filled in when it ends, and by its `update`.

    On CUDA: bytes of tensors allocated on the device. Elsewhere: resident memory of the process, libraries included,
    within the block on Linux, since the process began on other systems.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        peak = PeakMemory(lambda: torch.cuda.max_memory_allocated(device), "tensors allocated on the device")
    else:
        since = "" if _reset_resident_peak() else " since it began"
        peak = PeakMemory(_resident_peak, f"resident memory of the process{since}")
    yield peak
    peak.update()


def resident_memory() -> int:
    """Bytes of the process that are in memory now, libraries included; on other systems than Linux the most so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _resident_peak_since_start()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _resident_peak_since_start()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def _resident_peak_since_start() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
