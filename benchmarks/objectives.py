"""Objectives of learning side by side, with one rounding on one grid: a markdown table.

    python benchmarks/objectives.py --bits W3A16 --objectives mse,fisher,prediction:weight=10:guidance=3 [...]

Roundings are AdaRound's from GPTQ's solution, weights in groups of 16 with scales in E4M3 by LeanQuant, inputs with a
scale for every 16 channels: FP4 or INT3, FP6 or none, as --bits says. An objective is a name and its options, among
which `full_precision_inputs=0.5`, `activation_drop=0.5`, `distribution_steps=500`, `unit=window`, `window=3` and
`overlap=1` are learning's own; `gptq` is what all begin with. Few prompts and few steps, so that the rows compare with
each other and with nothing else. Final latents, PSNR and block outputs are measured as in benchmarks/calibration.py.
The dB over the first row are those of the same images: their mean, and 1.96 of its standard errors. Seconds are
processor time. Rows are kept in OUT: what is there is not done again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from calibration import PROMPTS, Bench, psnr_of
from torch import Tensor

from dmquant.host.files import fingerprint, write_text
from dmquant.recipe import Recipe

WEIGHTS, ACTIVATIONS = {"W4": "fp4", "W3": "int3"}, {"A16": "none", "A6": "fp6"}
SOLVER = {"method": "gptq", "damping": 0.1, "sweeps": 4}
LEARNING = {"learning_rate": 0.1, "checks": 4}
OF_LEARNING = {"full_precision_inputs", "activation_drop", "distribution_steps", "unit", "window", "overlap"}
HEADER = ["objective", "block error, of the first row", "final latents, of it", "PSNR, dB", "dB over it", "seconds"]


def recipe_of(objective: str, options: argparse.Namespace) -> Recipe:
    """The recipe of a row; `gptq` learns nothing."""
    learning = LEARNING | {"iterations": options.iterations, "batch_size": options.batch_size}
    rounding: dict[str, Any] = {"method": "adaround", "regularizer": 1000, "begin": SOLVER}
    if objective == "gptq":
        rounding = SOLVER
    else:
        name, *settings = objective.split(":")
        given = dict(setting.split("=") for setting in settings)
        for key in OF_LEARNING & given.keys():
            learning[key] = yaml.safe_load(given.pop(key))
        learning["objective"] = {"method": name} | {key: yaml.safe_load(value) for key, value in given.items()}
    return Recipe.model_validate(
        {
            "name": objective,
            "weights": WEIGHTS[options.bits[:2]],
            "activations": ACTIVATIONS[options.bits[2:]],
            "granularity": "group:16",
            "activation_granularity": "group:16",
            "scale": "lean",
            "store": "e4m3",
            "rounding": rounding,
            "calibration": {"prompts": options.calibration_prompts, "steps_per_prompt": 10},
            "learning": learning,
        }
    )


def row_of(objective: str, options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What an objective comes to, from OUT where it is there."""
    recipe = recipe_of(objective, options)
    key = fingerprint(recipe=recipe.to_dict(), model=options.model, images=options.images, prompts=options.prompts)
    path = bench.out / "rows" / f"{key[:12]}.json"
    if not path.exists():
        began = time.process_time()
        backbone, _ = bench.quantized(replace(bench.settings, recipe=recipe))
        seconds = time.process_time() - began
        made: list[Tensor] = []
        with torch.no_grad():
            measured = bench.measure(backbone, seconds, made.append)
        row = vars(measured) | {"images": psnr_of(made[0], bench.reference[2]).tolist()}
        write_text(path, json.dumps(row))
    return json.loads(path.read_text())


def cells(objective: str, row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """The row of a table, beside the first."""
    blocks = fmean(own / other for own, other in zip(row["blocks"], first["blocks"], strict=True))
    over = [own - other for own, other in zip(row["images"], first["images"], strict=True)]
    interval = "" if row is first else f"{fmean(over):+.2f} ± {1.96 * stdev(over) / len(over) ** 0.5:.2f}"
    latents = f"{row['latents'] / first['latents']:.3f}"
    return [f"`{objective}`", f"{blocks:.3f}", latents, f"{row['psnr']:.2f}", interval, f"{row['seconds']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", default="mse,mse:rows=relative,fisher,sampler,prediction")
    parser.add_argument("--model", default="emoji-pixart")
    parser.add_argument("--bits", default="W3A16", help="W3 or W4 and A6 or A16")
    parser.add_argument("--calibration-prompts", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--prompts", default=PROMPTS, help="what images are made of; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    bench = Bench(options.out / options.model, options.images, options.model, options.prompts)
    with torch.no_grad():
        _ = bench.reference  # before anything is quantized
    rows: list[list[str]] = [HEADER, ["---"] * len(HEADER)]
    first = None
    for objective in options.objectives.split(","):
        row = row_of(objective, options, bench)
        first = first or row
        rows.append(cells(objective, row, first))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    print(f"\n{options.model}, {options.bits}, {options.images} images of {options.prompts}\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
