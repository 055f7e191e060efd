"""GGUF files beside full precision: PSNR on held-out prompts, and the images of plain diffusers beside dmquant's.

    python benchmarks/gguf_files.py RUN [FILE.gguf ...] [--model emoji-pixart] [--images 16]
    python benchmarks/gguf_files.py RUN FILE.gguf --plain

Takes the package gguf. RUN is a run folder of the model, with its calibration data. The first rows are full-precision
weights quantized for GGUF: by gguf itself, and by our search with and without calibrated importance; the layers are
those that RUN quantized. With --plain a process without dmquant makes the images of a UNet from FILE by diffusers'
loader, and the largest difference to the images of RUN's model is told.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.importance import mean_squares
from dmquant.diffusers.calling import call_pipeline
from dmquant.exchange.formats.gguf import blocks
from dmquant.pipelines.models.loading import load_pipeline
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.pipelines.models.registry import embedded_folder
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs.importance import data_of

CALL = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
PIXART = {"max_sequence_length": 24, "clean_caption": False, "use_resolution_binning": False}
OWN = ("Q4_0", "Q5_0", "Q8_0")  # that gguf quantizes to
PLAIN = """
import sys
import numpy, torch
# PyPI's torchvision is a CUDA build, which a CPU build of torch does not import without these.
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from diffusers import DiffusionPipeline, GGUFQuantizationConfig, UNet2DConditionModel
folder, file, out, *prompts = sys.argv[1:]
config = GGUFQuantizationConfig(compute_dtype=torch.float32)
unet = UNet2DConditionModel.from_single_file(file, config=folder, subfolder="unet", quantization_config=config)
pipeline = DiffusionPipeline.from_pretrained(folder, unet=unet)
noise = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))]
images = pipeline(prompts, generator=noise, output_type="np", num_inference_steps=20, guidance_scale=3.0, height=64,
    width=64).images
assert "dmquant" not in sys.modules
numpy.save(out, images)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--model", default="emoji-pixart")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    prompts = load_prompts("emoji-held-out")[: options.images]
    if options.plain:
        difference = np.abs(by_plain_diffusers(options, prompts) - images(options.run / "model", prompts)).max()
        print(f"largest difference of {len(prompts)} images by plain diffusers: {difference:.1e}")
        return
    pipeline = load_pipeline(embedded_folder(f"embedded:{options.model}"))
    source = open_source(options.run / "model")
    backbone = getattr(pipeline, source.component)
    exact = images(pipeline, prompts)
    original = {name: value.clone() for name, value in backbone.state_dict().items()}
    layers = [name for name, layer in source.layers.items() if isinstance(layer, nn.Linear)]
    store = CalibrationStore.open(data_of(options.run))
    importance, _ = mean_squares(backbone, layers, store, "cpu")

    def row(name: str, changed: dict[str, torch.Tensor]) -> None:
        backbone.load_state_dict(original | changed)
        error = np.square(np.rint(images(pipeline, prompts) * 255) - np.rint(exact * 255)).reshape(len(prompts), -1)
        print(f"| {name} | {np.mean(10 * np.log10(255**2 / error.mean(1))):.2f} dB |", flush=True)

    for name in OWN:
        kind = gguf.GGMLQuantizationType[name]
        own = {layer: gguf.quantize(original[f"{layer}.weight"].numpy(), kind) for layer in layers}
        row(f"{name} by gguf", {f"{layer}.weight": decoded(data, kind) for layer, data in own.items()})
    for kind in blocks.WRITTEN.values():
        for weighed in (False, True):
            ours = {}
            for layer in layers:
                weight = original[f"{layer}.weight"]
                cost = importance[layer] if weighed else torch.ones(weight.shape[1])
                fitting = kind if weight.shape[1] % kind.size == 0 else blocks.IQ4_NL
                data = blocks.quantize(weight, cost, fitting).numpy()
                ours[f"{layer}.weight"] = decoded(data, gguf.GGMLQuantizationType(fitting.number))
            row(f"{kind.name}, {'weighed by calibration' if weighed else 'all channels alike'}", ours)
    for file in options.files:
        opened = open_foreign(file)
        row(file.name, {f"{layer}.weight": one.weight() for layer, one in opened.layers.items()})


def decoded(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data, kind))


def images(pipeline, prompts: list[str]) -> np.ndarray:
    pipeline = load_pipeline(pipeline) if isinstance(pipeline, Path) else pipeline
    call = CALL | (PIXART if "PixArt" in type(pipeline).__name__ else {})
    return np.stack(call_pipeline(pipeline, prompts, range(len(prompts)), "np", call))


def by_plain_diffusers(options: argparse.Namespace, prompts: list[str]) -> np.ndarray:
    folder = embedded_folder(f"embedded:{options.model}")
    with tempfile.TemporaryDirectory() as room:
        out = Path(room, "images.npy")
        subprocess.run([sys.executable, "-c", PLAIN, folder, options.files[0], out, *prompts], check=True)
        return np.load(out)


if __name__ == "__main__":
    main()
