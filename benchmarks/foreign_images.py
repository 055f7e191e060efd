"""Images of exported models by plain diffusers, in a process without dmquant, beside dmquant's own.

    PYTHONPATH=folder-with-torchao python benchmarks/foreign_images.py [--to torchao] [--models emoji-pixart,emoji-sd]

Each embedded model is quantized without data, its linear layers alone, exported and loaded by diffusers' own loader.
Both make the same two images of `emoji-held-out` from the same noise. The yardsticks are how far dmquant's own images
in bfloat16 are from its own in float32, and its own in float32 from those of noise that is a millionth larger: where
inputs are rounded, the order of a sum decides roundings. `bfl` needs no package; it reads no PixArt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROMPTS = ["blue hibiscus, animals & nature, plant flower", "red car, travel & places, transport ground"]
STEPS = 10
ROW = {"granularity": "channel", "store": "fp32"}
SETTINGS = {
    "torchao": {
        "nvfp4": {"weights": "nvfp4", "scale": "mse"},
        "fp8": {"weights": "fp8_e4m3", **ROW},
        "fp8 x fp8": {"weights": "fp8_e4m3", "activations": "fp8_e4m3", **ROW},
        "int8 x int8": {"weights": "int8", "activations": "int8", **ROW},
        "int4": {"weights": "int4", "granularity": "group:32", "scale": "mse"},
    },
    "bfl": {"fp8": {"weights": "fp8_e4m3", **ROW}},
}


def images(pipe, call: dict, nudge: float = 0.0) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    backbone = getattr(pipe, "transformer", None) or pipe.unet
    side = backbone.config.sample_size
    noise = torch.randn(
        len(PROMPTS), backbone.config.in_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    latents = (noise * (1 + nudge)).to(backbone.dtype)
    return pipe(PROMPTS, latents=latents, output_type="pt", **call).images.float()


def declare_operators() -> None:
    """What a CUDA build of torchvision lacks beside a CPU build of torch, see dmquant/diffusers/torchvision.py."""
    global library
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def theirs(folder: Path, target: str, dtype: torch.dtype, call: dict) -> torch.Tensor:
    """Images by plain diffusers, which finds torchao by itself and is told of bfl."""
    if "+cpu" in torch.__version__:
        declare_operators()
    from diffusers import BFLQuantizationConfig, DiffusionPipeline, UNet2DConditionModel

    if target == "torchao":
        return images(DiffusionPipeline.from_pretrained(folder, dtype=dtype), call)
    unet = UNet2DConditionModel.from_single_file(
        str(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        config=str(folder),
        subfolder="unet",
        quantization_config=BFLQuantizationConfig(compute_dtype=dtype),
        dtype=dtype,
    )
    return images(DiffusionPipeline.from_pretrained(folder, unet=unet, dtype=dtype), call)


def quantized(model: str, settings: dict, target: str, folder: Path) -> None:
    """Save the embedded model, its linear layers quantized, and its export."""
    from diffusers import DiffusionPipeline

    from dmquant import quantize_pipeline
    from dmquant.exchange.formats import writable
    from dmquant.pipelines.models.opening import open_source
    from dmquant.pipelines.models.registry import embedded_folder, registered_models
    from dmquant.recipe import Recipe

    pipe = DiffusionPipeline.from_pretrained(embedded_folder(registered_models()[model].source))
    backbone = getattr(pipe, "transformer", None) or pipe.unet
    kept = [name for name, layer in backbone.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    recipe = Recipe(name="tried", engine=target, rules=[{"match": kept, "keep": True}] if kept else [], **settings)
    quantize_pipeline(pipe, recipe, out=folder / "ours")
    writable(target).export(open_source(folder / "ours"), folder / "theirs", lambda done, total: None)


def ours(folder: Path, dtype: torch.dtype, call: dict, nudge: float = 0.0) -> torch.Tensor:
    from diffusers import DiffusionPipeline

    from dmquant.kernels import forced

    with forced("reference"):
        return images(DiffusionPipeline.from_pretrained(folder / "ours", dtype=dtype), call, nudge)


def psnr(one: torch.Tensor, two: torch.Tensor) -> str:
    error = (one - two).square().mean()
    return "the same" if not error else f"{-10 * error.log10().item():.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="torchao", choices=SETTINGS)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd")
    parser.add_argument("--do", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        folder, dtype, call, out = options.do
        save_file(
            {"images": theirs(Path(folder), options.to, getattr(torch, dtype), json.loads(call)).contiguous()}, out
        )
        return

    import dmquant  # noqa: F401  before diffusers, for which it makes torchvision importable
    from dmquant.pipelines.models.registry import registered_models

    print("| model | weights, inputs | bfloat16 | yardstick | float32 | yardstick |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in options.models.split(","):
        spec = registered_models()[model]
        size = {
            "height": spec.height,
            "width": spec.width,
            "num_inference_steps": STEPS,
            "guidance_scale": spec.guidance,
        }
        call = {**spec.call, **size}
        for name, settings in SETTINGS[options.to].items():
            with tempfile.TemporaryDirectory() as place:
                folder, row = Path(place), []
                quantized(model, settings, options.to, folder)
                made = {dtype: ours(folder, getattr(torch, dtype), call) for dtype in ("bfloat16", "float32")}
                nudged = ours(folder, torch.float32, call, 1e-6)
                yardsticks = {"bfloat16": made["bfloat16"], "float32": nudged}
                for dtype, own in made.items():
                    given = [str(folder / "theirs"), dtype, json.dumps(call), str(folder / "out")]
                    command = [sys.executable, __file__, "--to", options.to, "--do", *given]
                    done = subprocess.run(command, capture_output=True, env=os.environ)
                    row.append(psnr(load_file(folder / "out")["images"], own) if not done.returncode else "not loaded")
                    (folder / "out").unlink(missing_ok=True)
                    row.append(psnr(yardsticks[dtype], made["float32"]))
                print(f"| {model} | {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
