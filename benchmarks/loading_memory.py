"""Peak memory of quantizing a PixArt transformer while loading it, against its packed size.

    python benchmarks/loading_memory.py [--blocks 28] [--recipe w4a6] [--scale mse]

Writes a transformer of PixArt-Sigma's width with random bfloat16 weights to a temporary folder, then loads it in a
fresh process with a `quantization_config` of that recipe and samples that process's anonymous memory (Linux). Pages
of the checkpoint that are mapped from the file are not counted: the system takes them back when it needs memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import dmquant  # before diffusers, for which it makes torchvision importable

PIXART_SIGMA = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
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
    "use_additional_conditions": False,
}


def write_checkpoint(folder: str, blocks: int) -> None:
    import torch
    from diffusers import PixArtTransformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    PixArtTransformer2DModel(**PIXART_SIGMA, num_layers=blocks).save_pretrained(folder)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def load_and_measure(folder: str, recipe: str, scale: str) -> None:
    import torch
    from diffusers import PixArtTransformer2DModel

    config = dmquant.QuantConfig(dmquant.Recipe.load(recipe).with_settings(scale=scale))
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    packed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    full = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    print(json.dumps({"packed": packed, "peak": peak - before, "full": full, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--recipe", default="w4a6")
    parser.add_argument("--scale", choices=("mse", "absmax"), default="mse")
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load_and_measure(options.load, options.recipe, options.scale)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, options.blocks)
        command = [sys.executable, __file__, "--load", folder, "--recipe", options.recipe, "--scale", options.scale]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    facts = json.loads(answer)
    print(
        f"{facts['full'] / 1e6:.0f} MB in bfloat16, {facts['packed'] / 1e6:.0f} MB packed; "
        f"loading peaked {(facts['peak'] - facts['packed']) / 1e6:.0f} MB above that, in {facts['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
