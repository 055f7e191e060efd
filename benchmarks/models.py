"""Every backbone at its full size, quantized to W4 while it loads: layers, bits, bytes, memory and time.

    python benchmarks/models.py [--models sd15,sdxl] [--recipe w4a6] [--folder DIR]

Builds each architecture from its published configuration with random weights. A checkpoint in the Hub's format
(bfloat16, in shards) is written to a folder below DIR, one shard in memory at a time; a fresh process loads it with a
`quantization_config` and saves it, another loads what was saved; then the folder is removed. Stops if a model has not
exactly the parameters of the published one. Peak memory is the resident memory of the whole process, libraries and
mapped pages of files included, which the system would take back if it needed them.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.diffusers.families import Family, families

if TYPE_CHECKING:
    from torch import nn

SHARD = "1GB"
BYTES_IN_16_BIT = 2
PACKED_SHARE = 0.6  # of the bfloat16 bytes: more than any backbone below comes to at 4 bits


@dataclass(frozen=True)
class Backbone:
    """A published backbone: its family, the configuration of its class, and how many parameters that gives."""

    family: str
    config: dict[str, Any]
    parameters: int


SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART_ALPHA = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}
PIXART_SIGMA = PIXART_ALPHA | {"use_additional_conditions": False, "interpolation_scale": 2}
HUNYUAN_11 = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "sample_size": 128,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "learn_sigma": True,
    "cross_attention_dim": 1024,
    "norm_type": "layer_norm",
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
}
HUNYUAN_12 = HUNYUAN_11 | {"use_style_cond_and_image_meta_size": False}
BACKBONES = {
    "sd15": Backbone("unet", SD15, 859_520_964),
    "sdxl": Backbone("unet", SDXL, 2_567_463_684),
    "pixart-alpha": Backbone("pixart", PIXART_ALPHA, 611_349_152),
    "pixart-sigma": Backbone("pixart", PIXART_SIGMA, 610_856_096),
    "hunyuan-1.1": Backbone("hunyuan", HUNYUAN_11, 1_516_534_048),
    "hunyuan": Backbone("hunyuan", HUNYUAN_12, 1_499_952_032),
}
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda facts: f"{facts['parameters']:,}",
    "in convolutions": lambda facts: f"{facts['convolutions'] / facts['parameters']:.1%}",
    "layers quantized": lambda facts: str(facts["layers"]),
    "kept": lambda facts: str(facts["kept"]),
    "bits a quantized weight": lambda facts: f"{facts['bits_per_weight']:.3f}",
    "bits a parameter": lambda facts: f"{8 * facts['packed'] / facts['parameters']:.3f}",
    "bf16, MB": lambda facts: f"{BYTES_IN_16_BIT * facts['parameters'] / 1e6:,.0f}",
    "packed, MB": lambda facts: f"{facts['packed'] / 1e6:,.0f}",
    "peak, MB": lambda facts: f"{facts['peak'] / 1e6:,.0f}",
    "seconds": lambda facts: f"{facts['seconds']:.0f}",
    "reload peak, MB": lambda facts: f"{facts['reload_peak'] / 1e6:,.0f}",
    "reload seconds": lambda facts: f"{facts['reload_seconds']:.1f}",
}


def measure(name: str, recipe: str, scratch: Path | None) -> dict[str, Any]:
    """The facts of one backbone, and no file left behind."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"dmquant-{name}-") as made:
        folder = Path(made)
        check_disk(name, folder)
        facts = write_checkpoint(name, folder / "full")
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--models", name, "--recipe", recipe]
            command += ["--folder", str(folder)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            facts |= json.loads(answer)
    return facts


def check_disk(name: str, folder: Path) -> None:
    needed = BYTES_IN_16_BIT * BACKBONES[name].parameters * (1 + PACKED_SHARE)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{name} needs {needed / 1e9:.1f} GB below {folder.parent}, which has {free / 1e9:.1f} GB free"
        )


def backbone_class(family: Family) -> type:
    import diffusers

    return getattr(diffusers, family.backbones[0])


def skeleton(name: str) -> "nn.Module":
    """The backbone without memory for its weights; stops unless it has the published number of parameters."""
    import torch

    backbone = BACKBONES[name]
    with torch.device("meta"):
        model = backbone_class(families()[backbone.family])(**backbone.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != backbone.parameters:
        raise SystemExit(f"{name} has {parameters:,} parameters; the published model has {backbone.parameters:,}")
    return model


def write_checkpoint(name: str, folder: Path) -> dict[str, Any]:
    """Random weights of variance 1 / fan-in in bfloat16, shard by shard; returns what is in them."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    model = skeleton(name)
    model.save_config(folder)
    state = model.state_dict()
    shards = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda tensor: BYTES_IN_16_BIT * tensor.numel(),
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    draw = torch.Generator().manual_seed(0)

    def weights(tensor: torch.Tensor) -> torch.Tensor:
        fan_in = tensor.numel() / len(tensor)
        return torch.randn(tensor.shape, generator=draw, dtype=torch.bfloat16).div_(math.sqrt(fan_in))

    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights(state[name]) for name in names}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    convolutions = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    return {"parameters": BACKBONES[name].parameters, "convolutions": convolutions}


def quantize_while_loading(name: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Load the checkpoint in `folder`/full quantized, as a user would, and save it to `folder`/packed."""
    import torch

    from dmquant.host.memory import peak_memory
    from dmquant.layers import QUANTIZED
    from dmquant.pipelines.runs.footprint import footprint

    family, model = families()[BACKBONES[name].family], skeleton(name)
    layers = sum(type(layer) in QUANTIZED for layer in model.modules())
    with peak_memory("cpu") as peak:
        began = time.perf_counter()
        model = backbone_class(family).from_pretrained(
            folder / "full", quantization_config=dmquant.QuantConfig(recipe), dtype=torch.bfloat16
        )
        seconds = time.perf_counter() - began
        model.save_pretrained(folder / "packed")
    quantized = sum(isinstance(layer, tuple(QUANTIZED.values())) for layer in model.modules())
    packed = sum(file.stat().st_size for file in (folder / "packed").glob("*.safetensors"))
    return {
        "layers": quantized,
        "kept": layers - quantized,
        "bits_per_weight": footprint(model).bits_per_weight,
        "packed": packed,
        "peak": peak.bytes,
        "seconds": seconds,
    }


def reload(name: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Load what `quantize_while_loading` saved."""
    import torch

    from dmquant.host.memory import peak_memory

    with peak_memory("cpu") as peak:
        began = time.perf_counter()
        backbone_class(families()[BACKBONES[name].family]).from_pretrained(folder / "packed", dtype=torch.bfloat16)
        seconds = time.perf_counter() - began
    return {"reload_peak": peak.bytes, "reload_seconds": seconds}


STEPS = {"quantize": quantize_while_loading, "reload": reload}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BACKBONES))
    parser.add_argument("--recipe", default="w4a6")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.models.split(",")
    if options.step:
        print(json.dumps(STEPS[options.step](names[0], options.recipe, options.folder)))
        return
    if unknown := set(names) - set(BACKBONES):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(BACKBONES)}")
    for line in (["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))):
        print(f"| {' | '.join(line)} |", flush=True)
    for name in names:
        facts = measure(name, options.recipe, options.folder)
        print(f"| {name} | {' | '.join(cell(facts) for cell in COLUMNS.values())} |", flush=True)


if __name__ == "__main__":
    main()
