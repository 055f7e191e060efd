"""The same prompt and seed alone and in a batch: how far the two images are apart, and what --deterministic costs.

    python benchmarks/batch_mates.py --threads 1 --out batch_mates.png

For each embedded model, in full precision and rounded to nearest: every image made alone and together with the others,
plainly and under `dmquant.deterministic`, and the time of the latter by that of the former. PSNR is of float32 pixels,
before a PNG rounds them to 8 bits. OUT shows the images alone, in the batch, and 4 times their difference.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from turns import table

import dmquant
from dmquant.diffusers.calling import call_pipeline
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import family_for, registered_models
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs.footprint import kernels_used
from dmquant.recipe import Recipe

INTEGER = {"granularity": "group:16", "activation_granularity": "product", "store": "int", "scale": "mse"}
RECIPES = {
    "full precision": None,
    "FP4, none": Recipe.load("rtn64", "fp4", "none"),
    "FP4, FP6": Recipe.load("rtn64", "fp4", "fp6"),
    "INT4, INT8": Recipe.load("rtn64", "int4", "int8").with_settings(**INTEGER),
}
AMPLIFIED = 4


class Images:
    """Images of one pipeline, float32 [images, height, width, 3] in 0..1, and the seconds that they took."""

    def __init__(self, pipeline, prompts: Sequence[str], call: dict):
        self.pipeline, self.prompts, self.call = pipeline, prompts, call

    def made(self, indices: Sequence[int]) -> tuple[np.ndarray, float]:
        prompts, began = [self.prompts[index] for index in indices], time.process_time()
        images = call_pipeline(self.pipeline, prompts, list(indices), "np", self.call)
        return np.asarray(images, dtype=np.float32), time.process_time() - began

    def together_and_alone(self) -> tuple[np.ndarray, np.ndarray, float]:
        together, seconds = self.made(range(len(self.prompts)))
        return together, np.concatenate([self.made([index])[0] for index in range(len(self.prompts))]), seconds


def psnr(images: np.ndarray, others: np.ndarray) -> list[float]:
    errors = np.square(images.clip(0, 1).astype(np.float64) - others.clip(0, 1)).mean(axis=(1, 2, 3))
    return [float("inf") if error == 0 else -10 * np.log10(error) for error in errors]


def summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})".replace(
        "inf (inf to inf)", "equal"
    )


def measured(model: str, options: argparse.Namespace) -> Iterator[tuple[list[str], np.ndarray]]:
    """A row of the table for each recipe, and its images alone, in the batch, and their difference."""
    spec = registered_models()[model]
    family, prompts = family_for(spec), load_prompts(options.prompts)[: options.images]
    steps = options.steps or spec.steps
    call = {"num_inference_steps": steps, "guidance_scale": spec.guidance, "height": spec.height, "width": spec.width}
    reference = None
    for name, recipe in RECIPES.items():
        pipeline = load_full_precision(spec, torch.float32, "cpu")
        backbone = getattr(pipeline, family.component)
        if recipe is not None:
            dmquant.quantize_(backbone, recipe)
        images = Images(pipeline, prompts, call | spec.call)
        together, alone, seconds = images.together_and_alone()
        with dmquant.deterministic(pipeline):
            same, also_alone, slower = images.together_and_alone()
        reference = together if reference is None else reference
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in kernels_used(backbone).items())
        numbers = summary(psnr(together, alone)), summary(psnr(same, also_alone)), summary(psnr(together, reference))
        yield [model, name, kernels, *numbers, f"{slower / seconds:.2f}"], np.stack([alone, together])


def drawn(pairs: Sequence[np.ndarray], shown: int) -> Image.Image:
    """Three lines for each recipe: images alone, in the batch, and their difference around grey."""
    lines = []
    for alone, together in pairs:
        lines += [alone, together, (together - alone) * AMPLIFIED + 0.5]
    pixels = np.concatenate([np.concatenate(list(line[:shown]), axis=1) for line in lines])
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--prompts", default="emoji-held-out")
    parser.add_argument("--images", type=int, default=8, help="images in the batch; default %(default)s")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="picture to write; of several models, the name of each is added")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = ["model", "weights, activations", "kernels", "alone and in a batch, PSNR, dB"]
    header += ["the same, deterministic", "to full precision", "time, deterministic / plain"]
    rows = []
    for model in options.models.split(","):
        pairs = []
        for row, images in measured(model, options):
            print(*row, sep="; ", flush=True)
            rows.append(row)
            pairs.append(images)
        if options.out:
            path = options.out.with_stem(f"{options.out.stem}-{model}")
            drawn(pairs, options.images).save(path)
    print(table(header, rows))


if __name__ == "__main__":
    main()
