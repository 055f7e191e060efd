"""What quantizing text encoders and VAEs costs: PSNR of images, with the backbone in full precision.

    python benchmarks/components.py [--models emoji-pixart,emoji-sd] [--images 16]

For each embedded model, part and format: bits a quantized weight, bytes over 16 bit, and the mean PSNR in dB to the
images of the full-precision pipeline, same prompts and noise. Whole-part formats leave no layer in high precision.
"""

import argparse

import numpy as np
import torch

import dmquant
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import resolve_model
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs.footprint import footprint
from dmquant.recipe import Recipe

NVFP4 = Recipe.load("rtn", "fp4").with_settings(name="NVFP4", granularity="group:16", store="e4m3")
RECIPES = {
    "W8 (fp8 weights)": Recipe.load("w8a16"),
    "W4 (fp4 weights)": Recipe.load("w4a16"),
    "W4, all layers": Recipe.load("w4a16").with_settings(keep="none"),
    "NVFP4 weights": NVFP4,
    "FP8 (weights and inputs)": Recipe.load("w8a8"),
    "NVFP4 (weights and inputs)": NVFP4.with_settings(activations="fp4", activation_granularity="group:16"),
}


def images(pipeline, prompts, call):
    """Images of all prompts with seeds 0, 1, ... as float64 arrays in 0..1."""
    made = []
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(prompt, generator=generator, output_type="np", **call)
        made.append(np.asarray(output.images[0], dtype=np.float64))
    return made


def psnr(one, other):
    return 10 * np.log10(1 / np.mean((one - other) ** 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--images", type=int, default=16)
    given = parser.parse_args()
    print("| model | part | format | bits a quantized weight | of 16 bit | PSNR (dB) |\n|---|---|---|---:|---:|---:|")
    for name in given.models.split(","):
        spec = resolve_model(name)
        prompts = load_prompts(spec.prompts)[: given.images]
        call = {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance, **spec.call}
        call |= {"height": spec.height, "width": spec.width}
        load = lambda spec=spec: load_full_precision(spec, torch.float32, "cpu")  # noqa: E731
        reference = images(quiet(load()), prompts, call)
        for part in ("text_encoder", "vae"):
            for label, recipe in RECIPES.items():
                pipeline = quiet(load())
                module = getattr(pipeline, part)
                elements = sum(tensor.numel() for tensor in module.parameters())
                dmquant.quantize_(module, recipe)
                for tensor in module.parameters():  # full precision is counted in 16 bit
                    tensor.data = tensor.data.bfloat16().float() if tensor.dtype == torch.float32 else tensor.data
                size = footprint(module)
                found = images(pipeline, prompts, call)
                mean = np.mean([psnr(a, b) for a, b in zip(reference, found, strict=True)])
                bytes_kept = size.kept_bytes / 2
                share = (size.quantized_bytes + bytes_kept) / (2 * elements)
                print(
                    f"| {name} | {part} | {label} | {size.bits_per_weight:.2f} | {share:.2f} | {mean:.1f} |", flush=True
                )


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
