"""What a low-rank branch adds to the time of a quantized layer, on the CPU: a markdown table.

    python benchmarks/branches.py [--rank 16] [--threads N] [--cpu-time]

W4A6 with the scales of the recipe `default`, in bfloat16, with and without the branch, which take turns in one process.
Ratios are those of the best of the calls (and the median of the ratios of each turn). `--cpu-time` counts processor
time, for a busy machine; it needs `--threads 1`.
"""

import argparse

import torch
from layers import CONVOLUTIONS, LINEARS
from torch import Tensor, nn
from turns import Stopwatch, machine, milliseconds, ratio, table, timed

from dmquant.activations import ActivationSpec
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.transforms import create

WEIGHTS, INPUTS = WeightSpec.parse("fp4", "group:16", store="e4m3"), ActivationSpec.parse("fp6", "group:16")


def row(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, rank: int, watch: Stopwatch) -> list[str]:
    branch = create([("lowrank", {"rank": rank, "iterations": 0})], layer, None)
    layers = {
        title: quantize_layer(layer, WEIGHTS, INPUTS, transforms=transforms)
        for title, transforms in (("without", ()), ("with", branch))
    }
    with torch.inference_mode():
        seconds = watch.run({title: (lambda one=one: one(x)) for title, one in layers.items()})
    best, median = ratio(seconds, "with", "without")
    added = branch[0].added_products() / layer.weight.numel()
    return [
        name,
        *(milliseconds(seconds[title]) for title in layers),
        f"{best:.2f} ({median:.2f})",
        f"{added:.3f}",
        f"{16 * added:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="of the branches")
    parser.add_argument("--turns", type=int, default=20, help="calls of each layer")
    arguments, clock = timed(parser)
    watch = Stopwatch(arguments.turns, clock)
    rows = []
    for name, columns, outputs, tokens in LINEARS:
        layer, x = nn.Linear(columns, outputs).bfloat16(), torch.randn(1, tokens, columns).bfloat16()
        title = f"{name} {columns}→{outputs}, {tokens:,} tokens"
        rows.append(row(title, layer, x, arguments.rank, watch))
    for columns, outputs, size in CONVOLUTIONS:
        layer = nn.Conv2d(columns, outputs, 3, padding=1).bfloat16()
        x = torch.randn(1, columns, size, size).bfloat16().to(memory_format=torch.channels_last)
        title = f"conv {columns}→{outputs} 3x3 at {size}x{size}"
        rows.append(row(title, layer, x, arguments.rank, watch))
    print(f"{machine(arguments)}; rank {arguments.rank}\n")
    print(table(["layer", "W4A6 ms", "with branch ms", "ratio", "products added", "bits added"], rows))


if __name__ == "__main__":
    main()
