"""Speed of single layers on the CPU: torch in both dtypes and compiled, dmquant, and other libraries.

    python benchmarks/layers.py --install PEERS                    # other libraries, each into its folder
    python benchmarks/layers.py --peers PEERS --out layers.json    # measure
    python benchmarks/layers.py --ways torch,dmquant [--quick]     # without the others

Ratios to the faster of torch's two dtypes: median, and in brackets the quartiles, over turns that alternate with that
dtype in one process, activation quantization and unpacking included. Each library has a process of its own. What takes
over 3 s a call, or a process that takes over --limit seconds, is not timed. Tables go to stdout, progress to stderr.
`ONEDNN_MAX_CPU_ISA=AVX2` shows what oneDNN gives a machine with AVX2 alone. `--cpu-time` counts processor time, for a
busy machine; it needs `--threads 1`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import ways
from torch import Tensor, nn
from turns import Stopwatch, add_timing, machine, quartiles, spread, table, take_timing
from ways import BFLOAT16, FLOAT32, WAYS, UnmeasuredError, reasons

LINEARS = [  # name, in, out, tokens
    ("PixArt attention", 1152, 1152, 1024),
    ("PixArt ff.net.0", 1152, 4608, 1024),
    ("PixArt ff.net.2", 4608, 1152, 1024),
    ("PixArt attention", 1152, 1152, 4096),
    ("PixArt ff.net.0", 1152, 4608, 4096),
    ("PixArt ff.net.2", 4608, 1152, 4096),
    ("SDXL attention", 640, 640, 4096),
    ("SDXL attention", 1280, 1280, 1024),
    ("SDXL GEGLU", 1280, 10240, 1024),
    ("SDXL ff.net.2", 5120, 1280, 1024),
]
CONVOLUTIONS = [(320, 320, 64), (640, 640, 32), (1280, 1280, 32)]  # in, out, height and width
PEERS_UP_TO = 1024  # tokens of a Linear: more take long, and show the same
LIMITS = {"dmquant W4A8": 0.65, "dmquant W4A6": 0.65, "dmquant W4A16": 1.05}  # of torch's faster dtype


def cases(quick: bool, peer: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Layers in float32 and their inputs, by name."""
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    linears = [one for one in LINEARS if not peer or one[-1] <= PEERS_UP_TO]
    for name, columns, rows, tokens in linears[:2] if quick else linears:
        x = torch.randn(1, tokens, columns)
        made[f"{name} {columns}→{rows}, {tokens:,} tokens"] = nn.Linear(columns, rows), x
    for columns, rows, size in CONVOLUTIONS[1:2] if quick else CONVOLUTIONS:
        layer, x = nn.Conv2d(columns, rows, 3, padding=1), torch.randn(1, columns, size, size)
        made[f"conv {columns}→{rows} 3x3 at {size}x{size}"] = layer, x
    return made


def work(arguments: argparse.Namespace, clock) -> None:
    """Measure the ways of one process: a line of JSON a layer."""
    import copy

    base = getattr(torch, arguments.base)
    mine = [way for way in WAYS if way.process == arguments.worker]
    if arguments.worker != "torch":
        mine = [next(way for way in WAYS if way.name == (FLOAT32 if base == torch.float32 else BFLOAT16)), *mine]
    watch = Stopwatch(arguments.turns, clock)
    for name, (layer, x) in cases(arguments.quick, any(way.packages for way in mine)).items():
        torch._dynamo.reset()
        calls, why = {}, {}
        with torch.no_grad():
            for way in mine:
                try:
                    if not isinstance(layer, way.kinds):
                        raise UnmeasuredError("no convolutions")
                    with reasons():
                        call = way.make(copy.deepcopy(layer), x, base)
                        call()
                        start = time.perf_counter()
                        call()
                    if time.perf_counter() - start > ways.LONGEST:
                        raise UnmeasuredError(f"{time.perf_counter() - start:.0f} s a call")
                    calls[way.name] = call
                except UnmeasuredError as reason:
                    why[way.name] = str(reason)
            seconds = watch.run(calls)
        about = {name: [call.kernel, call.bits] for name, call in calls.items() if isinstance(call, ways.Quantized)}
        print(json.dumps({"layer": name, "seconds": seconds, "why": why, "about": about}), flush=True)


def measure(process: str, base: str, arguments: argparse.Namespace) -> list[dict[str, Any]] | str:
    """What a worker says, a dictionary a layer; or why there is none."""
    environment = ways.environment(process, arguments.peers)
    if environment is None:
        return "not installed"
    command = [sys.executable, __file__, "--worker", process, "--base", base, "--turns", str(arguments.turns)]
    command += [*(["--quick"] if arguments.quick else []), *(["--cpu-time"] if arguments.cpu_time else [])]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    print(f"{time.strftime('%H:%M:%S')} {process}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.limit)
        output, end = done.stdout, f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as late:
        output, end = (late.stdout or b"").decode(), f"over {arguments.limit} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"layer"')]
    if not lines:
        print(end, file=sys.stderr)
    return lines or end.partition("\n")[0][:80]


def faster(lines: list[dict[str, Any]]) -> str:
    """The dtype in which torch's layers take less time in all, of those that were timed in both."""
    both = [line["seconds"] for line in lines if {FLOAT32, BFLOAT16} <= line["seconds"].keys()]
    totals = {name: sum(statistics.median(seconds[name]) for seconds in both) for name in (FLOAT32, BFLOAT16)}
    return "bfloat16" if totals[BFLOAT16] < totals[FLOAT32] else "float32"


def cell(line: dict[str, Any] | None, way: str, base: str) -> str:
    """The ratio of a way to the base in one layer, or why there is none."""
    if line is None or way not in line["seconds"]:
        return "" if line is None else line["why"].get(way, "")
    return spread(a / b for a, b in zip(line["seconds"][way], line["seconds"][base], strict=True))


def report(results: dict[str, Any], base: str) -> str:
    """Markdown tables of layers by ways: torch's, dmquant's, and one of all other libraries."""
    base_name = FLOAT32 if base == "float32" else BFLOAT16
    parts = []
    for process in ("torch", "dmquant"):
        found, names = results.get(process), [way.name for way in WAYS if way.process == process]
        if not isinstance(found, list):
            parts.extend([] if found is None else [f"{process}: {found}"])
            continue
        milliseconds = (spread((1e3 * value for value in line["seconds"][base_name]), 1) for line in found)
        cells = ([cell(line, name, base_name) for name in names] for line in found)
        rows = [[line["layer"], time, *rest] for line, time, rest in zip(found, milliseconds, cells, strict=True)]
        parts.append(table(["layer", f"{base_name}, ms", *names], rows))
        if process == "dmquant":
            parts.append(about(found, names))
    others = [way for way in WAYS if way.packages and way.process in results]
    by_layer = {
        way.name: {line["layer"]: line for line in results[way.process]}
        for way in others
        if isinstance(results[way.process], list)
    }
    layers = list(dict.fromkeys(layer for lines in by_layer.values() for layer in lines))
    rows = [
        [layer, *(cell(by_layer[way.name].get(layer), way.name, base_name) for way in others if way.name in by_layer)]
        for layer in layers
    ]
    if rows:
        parts.append(table(["layer", *by_layer], rows))
    parts.extend(f"{way.name}: {results[way.process]}" for way in others if way.name not in by_layer)
    return "\n\n".join(parts)


def about(lines: list[dict[str, Any]], names: list[str]) -> str:
    """Kernels and bits of dmquant's ways."""
    rows = [
        [line["layer"], *("{}, {:.2f}".format(*line["about"][name]) if name in line["about"] else "" for name in names)]
        for line in lines
    ]
    return "Kernel that ran, and bits a weight that are kept:\n\n" + table(["layer", *names], rows)


def misses(lines: list[dict[str, Any]], base: str) -> list[str]:
    """A line for every layer above its limit."""
    base_name = FLOAT32 if base == "float32" else BFLOAT16
    found = []
    for line in lines:
        for way, limit in LIMITS.items():
            if way in line["seconds"]:
                pairs = zip(line["seconds"][way], line["seconds"][base_name], strict=True)
                _, median, _ = quartiles(a / b for a, b in pairs)
                if median > limit:
                    found.append(
                        f"- missed: {line['layer']}: {way} is {median:.2f} of {base_name}, the limit is {limit}"
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="PEERS", help="install the other libraries there, and end")
    parser.add_argument("--peers", type=Path, help="the folder that they were installed to")
    parser.add_argument("--ways", help="of these processes alone: torch,dmquant,...")
    parser.add_argument("--quick", action="store_true", help="two linear layers and one convolution")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--limit", type=int, default=240, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, help="every measured second as JSON, for benchmarks/speed_plot.py")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="float32", help=argparse.SUPPRESS)
    add_timing(parser)
    arguments = parser.parse_args()
    if arguments.install:
        ways.install(arguments.install)
        return
    clock = take_timing(arguments, parser)
    if arguments.worker:
        work(arguments, clock)
        return
    processes = list(dict.fromkeys(way.process for way in WAYS))
    wanted = arguments.ways.split(",") if arguments.ways else processes
    results: dict[str, Any] = {"torch": measure("torch", "float32", arguments)}
    if not isinstance(results["torch"], list):
        raise SystemExit(f"torch itself was not measured: {results['torch']}")
    base = faster(results["torch"])
    for process in processes[1:]:
        if process in wanted:
            results[process] = measure(process, base, arguments)
    print(machine(arguments), end="\n\n")
    print(report(results, base), end="\n\n")
    if isinstance(results.get("dmquant"), list):
        print("\n".join(misses(results["dmquant"], base)) or "All limits are kept.")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(arguments), "base": base, "results": results}))


if __name__ == "__main__":
    main()
