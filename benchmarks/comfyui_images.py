"""Images of a saved model against those of its ComfyUI file, by comfy-kitchen in a process that knows no dmquant.

    python benchmarks/comfyui_images.py runs/NAME/model --kitchen FOLDER [--original emoji-pixart] [--prompts 8]

`FOLDER` holds comfy-kitchen (`pip install --no-deps --target FOLDER comfy-kitchen==0.2.40`). `--original` is the
embedded model that it is of. Prints the largest difference of a pixel, of 0 to 1, and the
least PSNR of an image.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.exchange.formats import writable
from dmquant.pipelines.models.opening import open_source
from dmquant.pipelines.models.registry import embedded_folder, registered_models
from dmquant.pipelines.prompts.lists import load_prompts

LOADER = Path(__file__).with_name("comfyui_loader.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kitchen", type=Path, required=True)
    parser.add_argument("--original", choices=["emoji-pixart", "emoji-sd"], default="emoji-pixart")
    parser.add_argument("--prompts", type=int, default=8)
    given = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    prompts = load_prompts("emoji-held-out", given.prompts)
    spec = registered_models()[given.original]
    size = {"height": spec.height, "width": spec.width, "num_inference_steps": 10, "guidance_scale": spec.guidance}
    call = {**spec.call, **size}
    with tempfile.TemporaryDirectory() as folder:
        file, images = Path(folder) / "model.safetensors", Path(folder) / "images.pt"
        written = writable("comfyui").export(open_source(given.model), file, lambda done, total: None)
        environment = os.environ | {"PYTHONPATH": str(given.kitchen)}
        command = [
            sys.executable,
            str(LOADER),
            str(file),
            str(embedded_folder(spec.source)),
            str(images),
            json.dumps(call),
        ]
        subprocess.run([*command, *prompts], env=environment, check=True)
        theirs = torch.load(images)
    pipeline = dmquant.load_pipeline(given.model)
    pipeline.set_progress_bar_config(disable=True)
    ours = [
        pipeline(prompt, generator=torch.Generator().manual_seed(index), output_type="np", **call).images
        for index, prompt in enumerate(prompts)
    ]
    lost = torch.cat([torch.from_numpy(image) for image in ours]) - theirs
    squares = lost.square().flatten(1).mean(1)
    worst = -10 * squares.amax().clamp(min=1e-30).log10().item()
    print(f"{written.formats}: largest difference {lost.abs().amax().item():.2e}, least PSNR {worst:.1f} dB")


if __name__ == "__main__":
    main()
