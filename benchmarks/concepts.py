"""Draw the pictures of docs/concepts.md from runs of the embedded model.

    python benchmarks/concepts.py --out docs/images

numbers.png: the values of formats, scaled so that their largest is one. ranges.png: the largest magnitude of the input
of one layer in each block, call by call of the backbone. errors.png: relative error of the output of each block, of the
backbone quantized by `rtn` and of one block alone quantized. All in float32 on a CPU, by the model's own call.
"""

import argparse
import copy
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot

import dmquant
from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.pipelines.models.registry import embedded_folder, registered_models

ensure_torchvision_imports()

from diffusers import DiffusionPipeline

FORMATS = ("int4", "fp4_e2m1", "nl4", "int6", "fp6_e2m3", "fp6_e3m2")
LAYER = "ff.net.2"
COLOURS = ("#1f6f8b", "#d9a441", "#8a4f7d", "#5f8f4e", "#b5533c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    save(numbers(), options.out / "numbers.png")
    spec = registered_models()["emoji-pixart"]
    pipe = DiffusionPipeline.from_pretrained(embedded_folder(spec.source))
    pipe.set_progress_bar_config(disable=True)

    def run() -> None:
        call = {"height": spec.height, "width": spec.width, "guidance_scale": spec.guidance, **spec.call}
        pipe("red apple", num_inference_steps=options.steps, generator=torch.Generator().manual_seed(0), **call)

    save(ranges(pipe.transformer, run), options.out / "ranges.png")
    save(errors(pipe.transformer, run), options.out / "errors.png")


def numbers() -> pyplot.Figure:
    """A row of marks for each format."""
    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    for row, name in enumerate(FORMATS):
        fmt = dmquant.get_format(name)
        axes.plot(fmt.values / fmt.max, [row] * len(fmt.values), "|", markersize=16, color=COLOURS[row // 3])
    axes.set_yticks(range(len(FORMATS)), FORMATS)
    axes.invert_yaxis()
    axes.set_xlabel("value over the largest value")
    axes.set_xlim(-1.25, 1.05)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def ranges(backbone: torch.nn.Module, run) -> pyplot.Figure:
    """A line for each block: the largest input of one of its layers in every call."""
    largest = {at: [] for at in range(len(backbone.transformer_blocks))}

    def watch(at: int):
        return lambda module, inputs: largest[at].append(inputs[0].abs().max().item())

    handles = [
        block.get_submodule(LAYER).register_forward_pre_hook(watch(at))
        for at, block in enumerate(backbone.transformer_blocks)
    ]
    run()
    for handle in handles:
        handle.remove()
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for at, values in largest.items():
        axes.plot(range(1, len(values) + 1), values, marker=".", color=COLOURS[at % len(COLOURS)], label=f"block {at}")
    axes.set(
        xlabel="step, from noise to image",
        ylabel=f"largest input of {LAYER}",
        ylim=(0, 1.25 * max(map(max, largest.values()))),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, ncols=5, frameon=False, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def errors(backbone: torch.nn.Module, run) -> pyplot.Figure:
    """Two bars for each block: the error that reaches its output, and the error that it adds by itself."""
    inputs = []
    handle = backbone.register_forward_pre_hook(lambda _, given, named: inputs.append((given, named)), with_kwargs=True)
    run()
    handle.remove()
    quantized = copy.deepcopy(backbone)
    dmquant.quantize_(quantized, "rtn")
    blocks = len(backbone.transformer_blocks)
    total, own = torch.zeros(blocks), torch.zeros(blocks)
    for given, named in inputs:
        exact, far = outputs(backbone, given, named), outputs(quantized, given, named)
        for at in range(blocks):
            (block_inputs, block_named), block_output = exact[at]
            with torch.no_grad():
                alone = quantized.transformer_blocks[at](*block_inputs, **block_named)
            total[at] += (far[at][1] - block_output).norm() / block_output.norm() / len(inputs)
            own[at] += (alone - block_output).norm() / block_output.norm() / len(inputs)
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    places = torch.arange(blocks)
    axes.bar(places - 0.2, total, width=0.4, color=COLOURS[0], label="all blocks quantized")
    axes.bar(places + 0.2, own, width=0.4, color=COLOURS[1], label="this block alone")
    axes.set(xlabel="block", ylabel="error over norm of the output", xticks=places)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def outputs(backbone: torch.nn.Module, given, named) -> list:
    """What each block was given in a call of the backbone, and what it gave."""
    seen = []

    def keep(module, inputs, keywords, output) -> None:
        seen.append(((inputs, keywords), output))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in backbone.transformer_blocks]
    backbone(*given, **named)
    for handle in handles:
        handle.remove()
    return seen


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
