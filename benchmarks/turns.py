"""What benchmarks of speed share: calls that take turns, their spread, the machine they ran on, tables."""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from dmquant.cpu import lookup

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimddp")


class Stopwatch:
    """Calls variants in turns and keeps their seconds."""

    def __init__(self, turns: int, clock: Callable[[], float]):
        self.turns, self.clock = turns, clock

    def run(self, variants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        seconds = {name: [] for name in variants}
        for call in variants.values():
            call()
        for _ in range(self.turns):
            for name, call in variants.items():
                start = self.clock()
                call()
                seconds[name].append(self.clock() - start)
        return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """Of the bests, and the median over turns."""
    turns = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    return min(seconds[name]) / min(seconds[base]), statistics.median(turns)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    ordered = sorted(values)
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return low, middle, high


def spread(values: Iterable[float], digits: int = 2) -> str:
    """`median (lower to upper quartile)`."""
    low, middle, high = (f"{value:.{digits}f}" for value in quartiles(values))
    return f"{middle} ({low} to {high})"


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * min(seconds):.2f} ({1e3 * statistics.median(seconds):.2f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(arguments: argparse.Namespace) -> str:
    """Date, processor, its instructions for products, threads, clock and versions."""
    model, flags = platform.processor() or platform.machine(), []
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        named = [line for line in lines if line.startswith(("model name", "cpu family"))]
        model = ", ".join(dict.fromkeys(line.replace("\t", "") for line in named)) or model
        has = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
        flags = [flag for flag in FLAGS if flag in has]
    told = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "DMQUANT_KERNEL") if name in os.environ]
    clock = "processor time" if arguments.cpu_time else "wall time"
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    about = (model, f"instructions {', '.join(flags) or 'unknown'}", *told)
    return f"{time.strftime('%Y-%m-%d')}; {'; '.join(about)}; {torch.get_num_threads()} thread(s), {clock}; {versions}"


def add_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="torch threads (default: as torch chooses)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine; one thread only")


def take_timing(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Callable[[], float]:
    """Set what `add_timing` added; returns the clock that it asks for."""
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time needs --threads 1: it would count what waiting threads spend")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lookup.PAYS_AFTER = 0  # compile at the first call, as a long run has done by now
    return time.process_time if arguments.cpu_time else time.perf_counter


def timed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The parsed arguments, with --threads and --cpu-time, which take effect; and the clock that they ask for."""
    add_timing(parser)
    arguments = parser.parse_args()
    return arguments, take_timing(arguments, parser)
