"""Objectives of learning side by side, with one rounding on one grid: a markdown table.

    python benchmarks/objectives.py --bits W3A16 --objectives mse,fisher,prediction:weight=10:guidance=3 [...]
    python benchmarks/objectives.py --block transformer_blocks.2 [...]

Roundings are AdaRound's from GPTQ's solution, weights in groups of 16 with scales in E4M3 by LeanQuant, inputs with a
scale for every 16 channels: FP4 or INT3, FP6 or none, as --bits says. An objective is a name and its options, among
OF_LEARNING = {
    *("learning_rate", "full_precision_inputs", "activation_drop", "distribution_steps"),
    *("unit", "window", "overlap"),
}
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
from torch import Tensor, nn

from dmquant.calib.blocks.prediction import prediction_of
from dmquant.host.files import fingerprint, write_text
from dmquant.recipe import Recipe

WEIGHTS, ACTIVATIONS = {"W4": "fp4", "W3": "int3"}, {"A16": "none", "A6": "fp6"}
SOLVER = {"method": "gptq", "damping": 0.1, "sweeps": 4}
LEARNING = {"learning_rate": 0.1, "checks": 4}
OF_LEARNING = {
    *("learning_rate", "full_precision_inputs", "activation_drop", "distribution_steps"),
    *("unit", "window", "overlap"),
}
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


def one_block_row(objective: str, options: argparse.Namespace, bench: Bench) -> dict[str, float]:
    """Errors with one block quantized, from OUT where they are there."""
    recipe = recipe_of(objective, options)
    rules = [{"match": "*", "keep": True}, {"match": f"{options.block}.*", "keep": False}]
    recipe = recipe.with_settings(rules=rules, keep="none")
    key = fingerprint(recipe=recipe.to_dict(), model=options.model)
    path = bench.out / "rows" / f"{key[:12]}.json"
    if not path.exists():
        began = time.process_time()
        backbone, _ = bench.quantized(replace(bench.settings, recipe=recipe))
        seconds = time.process_time() - began
        errors = errors_of(backbone, options.block, bench)
        write_text(path, json.dumps({"seconds": seconds} | errors))
    return json.loads(path.read_text())


@torch.no_grad()
def errors_of(backbone: nn.Module, block: str, bench: Bench) -> dict[str, float]:
    """Relative squared errors of the block's output, of predictions and of what guidance makes of them."""
    (store, _), guidance = bench.held_out, bench.settings.call.get("guidance_scale", 1.0)
    sums = {"block": [0.0, 0.0], "prediction": [0.0, 0.0], "guided": [0.0, 0.0]}
    for batch in bench.batches():
        arguments = store.batch(batch)
        own, exact = ({}, {})
        for model, found in ((backbone, own), (bench.full, exact)):
            keep = model.get_submodule(block).register_forward_hook(
                lambda module, args, output, found=found: found.update(block=output)
            )
            found["prediction"] = prediction_of(model(**arguments[1]), arguments)
            keep.remove()
            unconditional, conditional = found["prediction"].unflatten(0, (len(batch), 2)).unbind(1)
            found["guided"] = torch.lerp(unconditional, conditional, guidance)
        for name, (error, size) in sums.items():
            sums[name] = [
                error + float((own[name] - exact[name]).square().sum()),
                size + float(exact[name].square().sum()),
            ]
    return {name: error / size for name, (error, size) in sums.items()}


def one_block(options: argparse.Namespace, bench: Bench) -> list[list[str]]:
    """The table of --block."""
    rows = [["objective", "block error", "error of predictions", "of guided ones", "seconds"], ["---"] * 5]
    for objective in options.objectives.split(","):
        row = one_block_row(objective, options, bench)
        errors = [f"{row[name]:.5f}" for name in ("block", "prediction", "guided")]
        rows.append([f"`{objective}`", *errors, f"{row['seconds']:.0f}"])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    return rows


def whole(options: argparse.Namespace, bench: Bench) -> list[list[str]]:
    """The table of whole models."""
    with torch.no_grad():
        _ = bench.reference  # before anything is quantized
    rows, first = [HEADER, ["---"] * len(HEADER)], None
    for objective in options.objectives.split(","):
        row = row_of(objective, options, bench)
        first = first or row
        rows.append(cells(objective, row, first))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    return rows


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
    parser.add_argument("--block", help="the name of a block: that one alone, of a transformer with guidance")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    bench = Bench(options.out / options.model, options.images, options.model, options.prompts)
    rows = one_block(options, bench) if options.block else whole(options, bench)
    print(f"\n{options.model}, {options.bits}, {options.images} images of {options.prompts}\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
