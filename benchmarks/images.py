"""Seconds an image of the embedded models on the CPU: full precision in each dtype, and quantized in every way.

    python benchmarks/images.py [--models emoji-pixart,emoji-sd] [--images 11] [--threads N] [--cpu-time]

One image a call, of the preset's size, steps and guidance, text encoder and VAE included. Ways take turns in one
process: ratios to the faster dtype of full precision are medians (lower to upper quartile) over images. Quantizing is
data-free, since a calibrated model takes the same time. The second table is of one call of the backbone alone.
"""

import argparse
import copy
import statistics
import sys
from typing import Any

import dmquant  # before diffusers, for which it makes torchvision importable

import torch  # isort: skip
from blocks import RECIPES
from turns import Stopwatch, machine, spread, table, timed

from dmquant.diffusers.calling import call_pipeline
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.runs.footprint import kernels_used

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "a red apple"


def recorded_call(pipeline: Any, name: str, call: dict[str, Any]) -> tuple[tuple, dict]:
    """Arguments of the backbone's first call."""
    calls = []
    backbone = getattr(pipeline, name)
    hook = backbone.register_forward_pre_hook(lambda module, *given: calls.append(given), with_kwargs=True)
    call_pipeline(pipeline, [PROMPT], [0], "pil", {**call, "num_inference_steps": 1})
    hook.remove()
    return calls[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--images", type=int, default=11)
    arguments, clock = timed(parser)
    watch = Stopwatch(arguments.images, clock)
    images, steps, used = [], [], []
    for model in arguments.models.split(","):
        spec = registered_models()[model]
        name = "transformer" if spec.family == "pixart" else "unet"
        call = {
            "height": spec.height,
            "width": spec.width,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance,
            **spec.call,
        }
        pipelines = {kind: load_full_precision(spec, dtype, "cpu") for kind, dtype in DTYPES.items()}

        def image(pipeline: Any, call=call) -> None:
            call_pipeline(pipeline, [PROMPT], [0], "pil", call)

        seconds = Stopwatch(3, clock).run({kind: (lambda one=one: image(one)) for kind, one in pipelines.items()})
        base = min(seconds, key=lambda kind: statistics.median(seconds[kind]))
        for recipe, settings in RECIPES.items():
            pipelines[recipe] = copy.deepcopy(pipelines[base])
            one = dmquant.Recipe.load("rtn64").with_settings(scale="absmax", **settings)
            dmquant.quantize_(getattr(pipelines[recipe], name), one)
            print(f"{model}: {recipe}", file=sys.stderr)
        calls = {kind: recorded_call(pipeline, name, call) for kind, pipeline in pipelines.items()}

        def step(kind: str, pipelines=pipelines, calls=calls, name=name) -> None:
            given, named = calls[kind]
            with torch.no_grad():
                getattr(pipelines[kind], name)(*given, **named)

        for rows, function in ((images, lambda kind, p=pipelines: image(p[kind])), (steps, step)):
            seconds = watch.run({kind: (lambda kind=kind, f=function: f(kind)) for kind in pipelines})
            ratios = [spread(a / b for a, b in zip(values, seconds[base], strict=True)) for values in seconds.values()]
            unit = 1 if rows is images else 1e3
            rows.append([model, base, spread(unit * value for value in seconds[base]), *ratios])
        for recipe in RECIPES:
            kernels = kernels_used(getattr(pipelines[recipe], name))
            used.append(f"{model}, {recipe}: " + ", ".join(f"{kernel} in {count}" for kernel, count in kernels.items()))
    print(machine(arguments), end="\n\n")
    names = [*DTYPES, *RECIPES]
    print(table(["image of", "faster dtype", "its seconds", *names], images), end="\n\n")
    print(table(["one call of the backbone of", "faster dtype", "its ms", *names], steps), end="\n\n")
    print("Kernels by layers: " + "; ".join(used) + ".")


if __name__ == "__main__":
    main()
