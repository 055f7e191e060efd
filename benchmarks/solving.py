"""Processor time to collect the moments of one layer and to solve its rounding, as the recipe `default` does it.

    python benchmarks/solving.py [--shapes 1152x1152,1152x4608] [--tokens 8192] [--older PYTHON] [--turns 3]

Weights are normal; inputs are correlated and in FP6 in groups of 16, in calls of 4,096 tokens. One thread; seconds are
the processor's. `error` is the mean over rows of (w - q) H (w - q)^T per token, H damped, over that of nearest rounding
under scales of least weight error. `--older` is the interpreter of an environment that has an older dmquant: the two
take turns, and the last column is the ratio of their medians.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import torch

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.calib.layers.moments import Moments, fit_grid
from dmquant.convert import LayerPlan
from dmquant.qtensor import WeightSpec
from dmquant.rounding import gptq

CALL = 4096  # tokens
PARTS = ("moments", "factors", "scales and GPTQ", "descent")
OPTIONS = gptq.Options(damping=0.1, sweeps=4)


def measure(rows: int, columns: int, tokens: int) -> dict[str, float]:
    """Processor seconds of each of PARTS in this process, and the error."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    weight = torch.randn(rows, columns, generator=generator)
    spec, of_inputs = WeightSpec.parse("fp4", "group:16", "lean", "e4m3"), ActivationSpec.parse("fp6", "group:16")
    _solve(16, 64, torch.eye(64), spec)  # what is compiled at first use
    collected = Moments((rows, columns), spec, torch.device("cpu"), OPTIONS.columns)
    seconds = dict.fromkeys(PARTS, 0.0)
    for _ in range(tokens // CALL):
        x = fake_quantize(torch.randn(CALL, columns, generator=generator) @ mixing, of_inputs)
        began = time.process_time()
        collected.add(x)
        seconds["moments"] += time.process_time() - began
    times = [time.process_time()]
    collected.factors(OPTIONS)
    times.append(time.process_time())
    grid = fit_grid(weight, LayerPlan("layer", spec, None), collected, OPTIONS)
    times.append(time.process_time())
    values = gptq.start(grid, OPTIONS, collected.blocks()).hard()
    times.append(time.process_time())
    seconds |= {part: times[index + 1] - times[index] for index, part in enumerate(PARTS[1:])}
    nearest = fit_grid(
        weight, LayerPlan("layer", WeightSpec.parse("fp4", "group:16", "mse", "e4m3"), None), None
    ).nearest
    damped = collected.blocks()[0].double()
    damped.diagonal().add_(OPTIONS.damping * damped.diagonal().mean())
    errors = [(((one - weight).double() @ damped) * (one - weight)).sum().item() for one in (values, nearest)]
    return seconds | {"error": errors[0] / errors[1]}


def _solve(rows: int, columns: int, moments: torch.Tensor, spec: WeightSpec) -> None:
    collected = Moments((rows, columns), spec, torch.device("cpu"), OPTIONS.columns)
    collected.add(moments)
    grid = fit_grid(torch.randn(rows, columns), LayerPlan("layer", spec, None), collected, OPTIONS)
    gptq.start(grid, OPTIONS, collected.blocks())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1152x1152,1152x4608")
    parser.add_argument("--tokens", type=int, default=2 * CALL)
    parser.add_argument("--older")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*map(int, options.one.split("x")), options.tokens)))
        return
    print(f"| layer | dmquant | {' | '.join(PARTS)} | together | error | older over this |")
    print("|---" * (len(PARTS) + 5) + "|")
    for shape in options.shapes.split(","):
        pythons = {"this": sys.executable} | ({"older": options.older} if options.older else {})
        turns = {name: [] for name in pythons}
        for _ in range(options.turns):
            for name, python in pythons.items():
                command = [python, __file__, "--one", shape, "--tokens", str(options.tokens)]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                turns[name].append(json.loads(answer.splitlines()[-1]))
        totals = {name: median(sum(turn[part] for part in PARTS) for turn in own) for name, own in turns.items()}
        for name, own in turns.items():
            seconds = [f"{median(turn[part] for turn in own):.2f}" for part in PARTS]
            ratio = f"{totals['older'] / totals['this']:.1f}" if name == "this" and options.older else ""
            cells = [shape, name, *seconds, f"{totals[name]:.2f}", f"{own[0]['error']:.4f}", ratio]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
