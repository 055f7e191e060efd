"""Ratios of times that are measured once a machine: kept in the folder of caches, for this processor and torch."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dmquant.cpu.compiling import processor
from dmquant.errors import UserError
from dmquant.host import caches
from dmquant.host.files import write_text

TURNS = 5


def ratio(name: str, measure: Callable[[], float]) -> float:
    """What `measure` gave on this machine, under a name of its own: as remembered, or measured now."""
    known = caches.known(_file()).get(name)
    if isinstance(known, float):
        return known
    measured = measure()
    if file := _file():
        with contextlib.suppress(UserError):  # then the next process measures again
            write_text(file, json.dumps(caches.known(file) | {name: measured}))
    return measured


def best_times(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of each of some calls, in turns of all, the first of which prepares.

    Processor time of one thread: what else the machine does changes little of it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(1 + TURNS):
                for name, run in runs.items():
                    start = time.thread_time()
                    run()
                    seconds[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def _file() -> Path | None:
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DMQUANT_MAX_CPU_ISA")
    about = (torch.__version__, *map(os.environ.get, names), *processor())
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    folder = caches.folder()
    return folder and folder / "ratios" / f"{key}.json"
