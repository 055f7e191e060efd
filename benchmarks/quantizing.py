"""Weights quantized a second of processor time, beside peers and an older dmquant.

    python benchmarks/quantizing.py [--peers DIR] [--baseline CHECKOUT] [--turns 10] [--model]

Random bfloat16 weights of PixArt's ff.net.2 (1152 x 4608), one thread, without data: scales, codes and packing. All
contenders take turns, each in a process of its own, which has done its case once before. Peers are those found in DIR
(`pip install --target DIR --no-deps sdnq torchao gguf bitsandbytes`) or installed; CHECKOUT is an older dmquant.
`--model` adds seconds for all layers of PixArt-Sigma's transformer (0.61 B weights, random) by `quantize_`, in as many
threads as torch takes.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

SHAPE = (1152, 4608)
OURS = {
    "FP4, groups of 64, mse": ("fp4", "group:64", "mse", "bf16"),
    "NVFP4, mse": ("nvfp4", "group:16", "mse", "e4m3"),
    "INT4, groups of 64, mse": ("int4", "group:64", "mse", "bf16"),
    "FP4, groups of 32, pow2, mse": ("fp4", "group:32", "mse", "pow2"),
    "FP6, a channel, mse": ("fp6", "channel", "mse", "fp32"),
    "FP4, groups of 64, absmax": ("fp4", "group:64", "absmax", "bf16"),
    "INT4, groups of 64, absmax": ("int4", "group:64", "absmax", "bf16"),
}
PEERS = {
    "sdnq": "sdnq INT4, groups of 64",
    "torchao": "torchao INT4, groups of 64",
    "gguf": "gguf Q4_0, groups of 32",
    "bitsandbytes": "bitsandbytes FP4, groups of 64",
}
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def ours(case: str) -> Callable[[], object]:
    import torch

    from dmquant.qtensor import WeightSpec, quantize

    weight, spec = torch.randn(SHAPE).bfloat16(), WeightSpec.parse(*OURS[case])
    quantize(torch.randn(8192, 1152), spec)  # more than it waits for before it compiles
    return lambda: quantize(weight, spec)


def peers(package: str) -> Callable[[], object]:
    import torch

    weight = torch.randn(SHAPE).bfloat16()
    if package == "sdnq":
        from sdnq.quantizer import sdnq_quantize_layer_weight

        return lambda: sdnq_quantize_layer_weight(
            weight, layer_class_name="Linear", weights_dtype="int4", group_size=64, torch_dtype=torch.bfloat16
        )
    if package == "torchao":
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        def by_torchao() -> None:
            layer = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))

        return by_torchao
    if package == "gguf":
        import gguf

        return lambda: gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
    import bitsandbytes.functional

    return lambda: bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")


def work(kind: str, case: str) -> None:
    """Do the case once for each line that is read, and write the seconds that it took."""
    once = {"ours": ours, "peers": peers}[kind](case)
    once()
    for _ in sys.stdin:
        began = time.process_time()
        once()
        print(f"seconds {time.process_time() - began}", flush=True)


def whole_model(scale: str) -> None:
    """Write the wall and processor seconds that `quantize_` takes for PixArt-Sigma's transformer, and its weights."""
    import torch
    from diffusers import PixArtTransformer2DModel
    from loading_memory import PIXART_SIGMA

    import dmquant

    with torch.device("meta"):
        model = PixArtTransformer2DModel(**PIXART_SIGMA, num_layers=28).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.02)
    began, busy = time.perf_counter(), time.process_time()
    dmquant.quantize_(model, dmquant.Recipe.load("rtn64").with_settings(scale=scale))
    print(f"seconds {time.perf_counter() - began} {time.process_time() - busy}", flush=True)


class Worker:
    """A process that does one case when it is asked."""

    def __init__(self, kind: str, case: str, path: str | None):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {})
        command = [sys.executable, __file__, "--work", kind, case]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def seconds(self) -> float | None:
        """Of one turn; None where the case cannot run here."""
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        found = (line.split()[1] for line in self.process.stdout if line.startswith("seconds "))
        return None if (seconds := next(found, None)) is None else float(seconds)


def row(name: str, seconds: list[float], rival: list[float] | None) -> str:
    """Millions of weights a second, median and quartiles, and the median ratio of the rival's turns to these."""
    speeds = [SHAPE[0] * SHAPE[1] / 1e6 / each for each in seconds]
    low, _, high = statistics.quantiles(speeds, n=4)
    ratio = "" if rival is None else f"{statistics.median(a / b for a, b in zip(rival, seconds, strict=True)):.1f}"
    return f"| {name} | {statistics.median(speeds):.0f} ({low:.0f} to {high:.0f}) | {ratio} |"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def about_machine() -> str:
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model, flags = (re.search(rf"^{key}\s*: (.*)$", facts, re.MULTILINE) for key in ("model name", "flags"))
    has = [flag for flag in FLAGS if flags and flag in flags[1].split()]
    return f"{date.today()}; {model[1] if model else platform.processor()} ({', '.join(has)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="DIR", help="a folder that peers are installed in")
    parser.add_argument("--baseline", metavar="CHECKOUT", help="an older dmquant, to be measured too")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--model", action="store_true", help="a whole transformer, too")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        whole_model(options.work[1]) if options.work[0] == "model" else work(*options.work)
        return
    if options.peers:
        sys.path.insert(0, options.peers)
    first = Worker("ours", next(iter(OURS)), None)  # compiles, alone, what the others find
    first.seconds()
    first.process.communicate()
    workers = {("now", case): Worker("ours", case, None) for case in OURS}
    if options.baseline:
        workers |= {("before", case): Worker("ours", case, options.baseline) for case in OURS}
    workers |= {("peer", name): Worker("peers", name, options.peers) for name in PEERS if version(name)}
    taken: dict[tuple[str, str], list] = {key: [] for key in workers}
    for _ in range(options.turns):
        for key, worker in workers.items():
            taken[key].append(worker.seconds())
    for worker in workers.values():
        worker.process.communicate()
    print(f"{about_machine()}; torch {version('torch')}; one thread, median (quartiles) of {options.turns} turns\n")
    print("| by | M weights a processor second | faster than before |\n| --- | --- | --- |")
    for case in OURS:
        print(row(f"dmquant {case}", taken["now", case], taken.get(("before", case))))
    for case in OURS if options.baseline else ():
        print(row(f"dmquant before, {case}", taken["before", case], None))
    for name, title in PEERS.items():
        seconds = taken.get(("peer", name))
        if seconds is None or None in seconds:
            print(f"| {title} | {'not installed' if seconds is None else 'did not run'} | |")
        else:
            print(row(f"{title} ({name} {version(name)})", seconds, None))
    if options.model:
        print("\n| PixArt-Sigma's transformer, 0.61 B weights | seconds | processor seconds |\n| --- | --- | --- |")
        for path, when in ((None, ""), *([(options.baseline, " before")] if options.baseline else [])):
            for scale in ("mse", "absmax"):
                command = [sys.executable, __file__, "--work", "model", scale]
                environment = os.environ | ({"PYTHONPATH": path} if path else {})
                said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                wall, busy = map(float, said.splitlines()[-1].split()[1:])
                print(f"| dmquant{when}, {scale} | {wall:.1f} | {busy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
