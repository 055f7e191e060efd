"""What torch.compile takes to trace a quantized backbone, against the same in full precision.

    python benchmarks/tracing.py [--models emoji-pixart,emoji-sd] [--recipes w4a6,w4a16,w8a8] [--turns 3]

Processor seconds of the first call after torch.compile(backend="eager"), which traces and compiles nothing, less those
of a call, on one thread; full precision and quantized in turns, medians.
"""

import argparse
import statistics
import time

import torch

import dmquant
from dmquant.diffusers.families import family_of
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import resolve_model


def backbone_and_call(name, recipe):
    spec = resolve_model(name)
    pipeline = load_full_precision(spec, torch.float32, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    backbone = getattr(pipeline, family_of(pipeline).component)
    if recipe is not None:
        dmquant.quantize_(backbone, recipe)
    given = {}
    hook = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(call=(args, kwargs)), with_kwargs=True
    )
    pipeline("red apple", num_inference_steps=1, height=spec.height, width=spec.width, **spec.call)
    hook.remove()
    return backbone, given["call"]


@torch.no_grad()
def seconds(backbone, call):
    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend="eager")
    times = []
    for _ in range(2):
        began = time.process_time()
        compiled(*call[0], **call[1])
        times.append(time.process_time() - began)
    return times[0] - times[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--recipes", default="w4a6,w4a16,w8a8")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{torch.backends.cpu.get_cpu_capability()}\n| model | recipe | full precision | quantized | ratio |")
    print("|---|---|---:|---:|---:|")
    for name in given.models.split(","):
        plain = backbone_and_call(name, None)
        seconds(*plain)
        for recipe in given.recipes.split(","):
            quantized = backbone_and_call(name, recipe)
            turns = [(seconds(*plain), seconds(*quantized)) for _ in range(given.turns)]
            full, ours = (statistics.median(one) for one in zip(*turns, strict=True))
            print(f"| {name} | `{recipe}` | {full:.2f} s | {ours:.2f} s | {ours / full:.2f} |", flush=True)


if __name__ == "__main__":
    main()
