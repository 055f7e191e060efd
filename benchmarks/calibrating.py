"""Processor time to calibrate the embedded models by the recipe `default`, capturing and deciding apart.

    python benchmarks/calibrating.py [--models emoji-pixart,emoji-sd] [--older PYTHON] [--turns 3] [--images 16]

One thread, the processor's seconds. Errors are those of block outputs on samples that are held out, as the calibration
itself counts them: the geometric mean over the blocks, and that of the last. PSNR is that of IMAGES images of 20 steps
before they are rounded to 8 bits, of prompts of `emoji-held-out`, against full precision. `a run` is full precision on
the calibration prompts with their images, which is what capturing may cost at most. `--older` is the interpreter of an
environment that has an older dmquant: the two take turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median

import torch

import dmquant  # noqa: F401 (before diffusers, for which it makes torchvision importable)
from dmquant.host.console import Console, quiet_libraries
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs.calibration import calibrate, calibration_data, weights_key
from dmquant.pipelines.runs.settings import Options, resolve

BATCH = 8


def images_of(pipeline, prompts: list[str], call: dict) -> torch.Tensor:
    """Images (prompts, 3, height, width) in [0, 1], seeds 0, 1, ..."""
    made = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            seeds = [torch.Generator().manual_seed(start + at) for at in range(len(prompts[start : start + BATCH]))]
            output = pipeline(prompts[start : start + BATCH], generator=seeds, output_type="pt", **call)
            made.append(output.images.float())
    return torch.cat(made)


def measure(model: str, images: int, run: bool) -> dict[str, float]:
    """Processor seconds and errors of one calibration in this process."""
    torch.set_num_threads(1)
    quiet_libraries()
    options = Options(model=model, recipe="default", prompts="emoji-held-out", num_prompts=images, device="cpu")
    settings, console = resolve(options), Console()
    pipeline = load_full_precision(settings.model, settings.dtype, settings.device)
    pipeline.set_progress_bar_config(disable=True)
    key, call, prompts = weights_key(pipeline), settings.call, list(settings.prompts)
    settings = replace(settings, recipe=settings.recipe_for(getattr(pipeline, settings.family.component)))
    full, times = images_of(pipeline, prompts, call), {}

    def timed(name: str, work, *args):
        began = time.process_time()
        result = work(*args)
        times[name] = time.process_time() - began
        return result

    if run:
        learnt = list(settings.calibration_prompts)[: settings.recipe.calibration.prompts]
        timed("a run", images_of, pipeline, learnt, call)
    with tempfile.TemporaryDirectory() as folder:
        timed("capture", calibration_data, pipeline, settings, Path(folder), console, key)
        done = timed("calibrate", calibrate, pipeline, settings, Path(folder), console, key)
    errors = [task["error"] for block in done.blocks for task in block["tasks"]]
    psnr = -10 * (images_of(pipeline, prompts, call) - full).square().mean((1, 2, 3)).log10()
    return times | {"errors": geometric_mean(errors), "last": errors[-1], "psnr": psnr.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--older")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--run", action="store_true", help="measure full precision on the calibration prompts too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.images, options.run)))
        return
    columns = {"capture": ".1f", "calibrate": ".1f", "errors": ".5f", "last": ".4f", "psnr": ".2f"}
    columns = ({"a run": ".1f"} if options.run else {}) | columns
    print(f"| model | dmquant | {' | '.join(columns)} | of the older |")
    print("|---" * (len(columns) + 3) + "|")
    for model in options.models.split(","):
        pythons = {"this": sys.executable} | ({"older": options.older} if options.older else {})
        turns = {name: [] for name in pythons}
        for _ in range(options.turns):
            for name, python in pythons.items():
                command = [python, __file__, "--one", model, "--images", str(options.images)]
                command += ["--run"] if options.run else []
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                turns[name].append(json.loads(answer.splitlines()[-1]))
        for name, own in turns.items():
            cells = [f"{median(turn[column] for turn in own):{digits}}" for column, digits in columns.items()]
            older = turns["older"] if name == "this" and options.older else []
            shares = [new["calibrate"] / old["calibrate"] for new, old in zip(own, older, strict=bool(older))]
            share = f"{median(shares):.2f}" if shares else ""
            print(f"| {model} | {name} | {' | '.join(cells)} | {share} |", flush=True)


if __name__ == "__main__":
    main()
