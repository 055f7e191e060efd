"""Processor time of a gradient step of a unit, by the recipe `adaround`, against an older dmquant.

    python benchmarks/gradient_steps.py --older PYTHON [--turns 3] [--steps 100] [--recipe adaround]

One thread, the processor's seconds, a mini-batch of 8 backbone calls with both guidance branches. Each unit is learned
for STEPS steps in a process of its own, by the two in turns; a step is a tenth of the median of ten, without the first
ten and without checks on held-out samples. `--older` is the interpreter of an environment that has an older dmquant.
`held out` is the error of the unit at the end of these few steps over that of nearest rounding: of this one, and of the
older. Data are 8 prompts, scales are absmax: of the time of a step nothing depends on these.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import dmquant  # noqa: F401 (before diffusers, for which it makes torchvision importable)
from dmquant.calib.blocks import decide
from dmquant.host.console import Console, quiet_libraries
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs.calibration import calibrate, calibration_data, weights_key
from dmquant.pipelines.runs.settings import Options, resolve

UNITS = {
    "emoji-pixart": ("transformer_blocks.0", "transformer_blocks.3"),
    "emoji-sd": ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0", "up_blocks.2.attentions.0"),
}
TOLD = 10  # steps from one report of the loop to the next; the first are not counted


class DoneError(Exception):
    """All units have been measured."""


def measure(model: str, steps: int, recipe: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, and what was left of the error, of each unit of a model in this process."""
    torch.set_num_threads(1)
    quiet_libraries()
    settings, console = resolve(Options(model=model, recipe=recipe, num_prompts=8, device="cpu")), Console()
    learning = settings.recipe.learning.model_copy(update={"iterations": steps, "batch_size": 8, "checks": 1})
    data = settings.recipe.calibration.model_copy(update={"prompts": 8, "steps_per_prompt": 4})
    changes = {"scale": "absmax", "candidates": None, "learning": learning, "calibration": data}
    settings = replace(settings, recipe=settings.recipe.model_copy(update=changes))
    pipeline = load_full_precision(settings.model, settings.dtype, settings.device)
    pipeline.set_progress_bar_config(disable=True)
    settings = replace(settings, recipe=settings.recipe_for(getattr(pipeline, settings.family.component)))
    found, learn = {}, decide.learn

    def watched(unit, learners, data, options, report):
        if unit not in UNITS[model]:
            return learn(unit, learners, data, options.model_copy(update={"iterations": 0}), report)
        at = {}
        learned = learn(unit, learners, data, options, lambda step, loss: at.update({step: time.process_time()}))
        step = median(at[last] - at[last - TOLD] for last in at if last > TOLD) / TOLD
        found[unit] = {"step": 1e3 * step, "error": learned[0].error / learned[0].nearest_error}
        if len(found) == len(UNITS[model]):
            raise DoneError
        return learned

    decide.learn = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            key = weights_key(pipeline)
            calibration_data(pipeline, settings, Path(folder), console, key)
            calibrate(pipeline, settings, Path(folder), console, key)
    except DoneError:
        return found
    raise AssertionError("a unit was not reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--older", required=True)
    parser.add_argument("--models", default=",".join(UNITS))
    parser.add_argument("--recipe", default="adaround")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.recipe)))
        return
    print("| unit | a step, ms | the older, ms | ratio | held out | the older |")
    print("|---" * 6 + "|")
    pythons = {"this": sys.executable, "older": options.older}
    for model in options.models.split(","):
        turns = {name: [] for name in pythons}
        for _ in range(options.turns):
            for name, python in pythons.items():
                command = [python, __file__, "--one", model, "--steps", str(options.steps)]
                command += ["--recipe", options.recipe, "--older", options.older]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                turns[name].append(json.loads(answer.splitlines()[-1]))
        for unit in UNITS[model]:
            own, older = ([turn[unit] for turn in turns[name]] for name in pythons)
            ratio = median(new["step"] / old["step"] for new, old in zip(own, older, strict=True))
            steps = [f"{median(turn['step'] for turn in each):.1f}" for each in (own, older)]
            errors = [f"{each[0]['error']:.4f}" for each in (own, older)]
            print(f"| {model} {unit} | {' | '.join(steps)} | {ratio:.2f} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
