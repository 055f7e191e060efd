"""What separate scales for the two halves of a concatenation buy: errors of those layers, and of the images.

    python benchmarks/split_scales.py --model emoji-sd --out runs/split-scales

Every variant is the recipe `rtn64` with and without the `split` that the model's family sets, and, as `conv1`, with one
for the first convolution behind each concatenation too, which reads it through a group norm. The error of a layer is
that of its output over the output's variance, on inputs of the full-precision model; the mean over all layers
behind a concatenation is shown. Images come from `dmquant compare`, whose report is in OUT/compare.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dmquant.convert import plan
from dmquant.layers import quantize_layer
from dmquant.pipelines.models.loading import load_full_precision, resolve_dtype
from dmquant.pipelines.runs.settings import Options, Settings, resolve
from dmquant.recipe import Recipe

SETTINGS = {
    "W4 channel": {"weights": "fp4", "granularity": "channel", "activations": "none"},
    "W4 group:64": {"weights": "fp4", "granularity": "group:64", "activations": "none"},
    "A6 token": {"weights": "int8", "granularity": "group:64", "activations": "fp6"},
    "A4 token": {"weights": "int8", "granularity": "group:64", "activations": "fp4"},
    "W4 channel, A6": {"weights": "fp4", "granularity": "channel", "activations": "fp6"},
    "W4 group:64, A6": {"weights": "fp4", "granularity": "group:64", "activations": "fp6"},
}
SPLITS = ("none", "shortcut", "shortcut and conv1")
PROMPTS, STEPS = 4, 5  # of the calls whose inputs the layers are tried on


def recipes(behind: dict[str, int]) -> dict[str, Recipe]:
    """Every variant by name; `behind` are the layers behind concatenations and the channels of the first half."""
    found = {}
    for title, settings in SETTINGS.items():
        for split in SPLITS:
            recipe = Recipe.load("rtn64").with_settings(**settings)
            if split == "none":
                recipe = recipe.splitting(dict.fromkeys(behind, 0))
            if split == "shortcut and conv1":
                recipe = recipe.splitting(behind | {first_of(name): channels for name, channels in behind.items()})
            name = f"{title}, split {split}"
            found[name] = recipe.with_settings(name=name.replace(":", "").replace(", ", "-").replace(" ", "-"))
    return found


def first_of(shortcut: str) -> str:
    return shortcut.replace("conv_shortcut", "conv1")


@torch.inference_mode()
def inputs_of(settings: Settings, pipeline, names: list[str]) -> dict[str, list[Tensor]]:
    """What each layer is given in one pipeline call of a few prompts and steps."""
    backbone, inputs = getattr(pipeline, settings.family.component), {name: [] for name in names}
    hooks = [
        backbone.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name in names
    ]
    prompts = list(settings.prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in range(PROMPTS)]
    call = settings.call | {"num_inference_steps": STEPS}
    settings.family.prompted(pipeline)(prompt=prompts, generator=generators, **call)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.inference_mode()
def output_error(backbone: nn.Module, recipe: Recipe, inputs: dict[str, list[Tensor]]) -> float:
    """Squared error over variance of the outputs, mean over the layers in `inputs`."""
    errors = []
    for step in plan(backbone, recipe):
        if step.name in inputs:
            layer = backbone.get_submodule(step.name)
            quantized = quantize_layer(layer, step.weights, step.activations)
            pairs = [(layer(x), quantized(x)) for x in inputs[step.name]]
            exact, rounded = (torch.stack(outputs) for outputs in zip(*pairs, strict=True))
            errors.append(((rounded - exact).square().mean() / exact.var()).item())
    return sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--prompts", default="emoji-held-out", help="what images are made of; default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/split-scales"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    settings = resolve(Options(options.model, recipe="rtn64", prompts=options.prompts, num_prompts=PROMPTS))
    pipeline = load_full_precision(settings.model, resolve_dtype(settings.dtype_name, "cpu"), "cpu")
    pipeline.set_progress_bar_config(disable=True)
    backbone = getattr(pipeline, settings.family.component)
    behind = settings.family.concatenations(backbone)
    variants = recipes(behind)
    firsts = [first_of(name) for name in behind]
    inputs = inputs_of(settings, pipeline, [*behind, *firsts])
    files = [options.out / f"{recipe.name}.yaml" for recipe in variants.values()]
    for recipe, file in zip(variants.values(), files, strict=True):
        recipe.save(file)
    command = [sys.executable, "-m", "dmquant", "compare", options.model, "--recipes", ",".join(map(str, files))]
    command += ["--prompts", options.prompts, "--num-prompts", str(options.num_prompts), "--metrics", "psnr,latent_mse"]
    subprocess.run([*command, "--out", str(options.out / "compare")], check=True)
    report = json.loads((options.out / "compare/report.json").read_text())["recipes"]

    print("\n| weights, activations | split | shortcuts' error | first convolutions' error | PSNR, dB | latent MSE |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, recipe in variants.items():
        setting, split = title.rsplit(", split ", 1)
        kept = recipe if "none" in split else recipe.splitting(behind)
        errors = [output_error(backbone, kept, {name: inputs[name] for name in names}) for names in (behind, firsts)]
        psnr, latents = (report[recipe.name]["metrics"][metric]["value"] for metric in ("psnr", "latent_mse"))
        print(f"| {setting} | {split} | {errors[0]:.5f} | {errors[1]:.5f} | {psnr:.2f} | {latents:.4f} |")


if __name__ == "__main__":
    main()
