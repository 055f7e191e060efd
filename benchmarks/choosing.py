"""Seconds to plan and to allocate formats for a model of many layers: what `--target-bits` adds to measuring costs.

    python benchmarks/choosing.py [--layers 1000] [--bits 4,4.5,5] [--threads N] [--cpu-time]

Layers are on the meta device, of the widths of Flux.1; costs are drawn. Beside the time stands what the choice gains
over one format for all, which depends on how far the drawn costs are apart.
"""

import argparse
import math
import random
import time

import dmquant  # noqa: F401 - before diffusers, for which it makes torchvision importable

import torch  # isort: skip
from torch import nn
from turns import machine, table, timed

from dmquant.calib.choice.allocation import cheapest, uniform
from dmquant.calib.choice.options import options_of, plans_by_option, stored_bytes
from dmquant.recipe import Recipe

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072), (18432, 3072))
DECADES = 2.5  # that costs of layers are apart, as those of emoji-pixart are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--bits", default="4,4.5,5")
    arguments, _ = timed(parser)
    drawn, recipe = random.Random(0), Recipe.load("default").with_settings(keep="none")
    with torch.device("meta"):
        layers = [nn.Linear(*reversed(SHAPES[number % len(SHAPES)]), bias=False) for number in range(arguments.layers)]
    model = nn.Sequential(*layers)
    began = time.perf_counter()
    plans = plans_by_option(model, recipe, options_of(recipe))
    sizes = {
        name: {option: stored_bytes(step, tuple(layers[int(name)].weight.shape)) for option, step in of_layer.items()}
        for name, of_layer in plans.items()
    }
    planned = time.perf_counter() - began
    weights = sum(layer.weight.numel() for layer in layers)
    costs = {}
    for name, of_layer in sizes.items():
        count, scale = layers[int(name)].weight.numel(), 10 ** drawn.uniform(-DECADES, 0)
        costs[name] = {option: scale * 4.0 ** (-8 * size / count) for option, size in of_layer.items()}
    rows = []
    for bits in map(float, arguments.bits.split(",")):
        began = time.perf_counter()
        choice = cheapest(costs, sizes, int(bits * weights / 8))
        seconds = time.perf_counter() - began
        beside = [one for one in uniform(sizes, costs).values() if one.bytes <= 1.01 * choice.bytes]
        gain = 10 * math.log10(min(one.cost for one in beside) / choice.cost)
        rows.append([f"{bits:g}", f"{8 * choice.bytes / weights:.4f}", f"{seconds:.2f}", f"{gain:.1f}"])
    print(machine(arguments), end="\n\n")
    print(f"{arguments.layers} layers, {len(plans['0'])} options: planned in {planned:.2f} s", end="\n\n")
    print(table(["bits asked", "bits a weight", "seconds to allocate", "dB over one format"], rows))


if __name__ == "__main__":
    main()
