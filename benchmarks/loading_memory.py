"""Peak memory of quantizing a PixArt transformer while loading it, and the time to load what was saved.

    python benchmarks/loading_memory.py [--blocks 28] [--recipe w4a6] [--scale mse] [--turns 5]

Writes a transformer of PixArt-Sigma's width with random bfloat16 weights to a temporary folder, then loads it in a
fresh process with a `quantization_config` of that recipe and samples that process's anonymous memory (Linux). Pages
of the checkpoint that are mapped from the file are not counted: the system takes them back when it needs memory.
Then full precision and what was saved packed are loaded in turn, each time in a fresh process, from a file that the
system was told to forget and from one that it remembers, until every page of the weights has been read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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
    model = PixArtTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    packed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    full = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    model.save_pretrained(f"{folder}/packed")
    print(json.dumps({"packed": packed, "peak": peak - before, "full": full, "seconds": seconds}))


def load_and_time(folder: str, cold: bool) -> None:
    """Write the wall and processor seconds from the call until each page of each weight was read."""
    import torch
    from diffusers import PixArtTransformer2DModel

    for file in Path(folder).glob("*.safetensors") if cold else ():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began, busy = time.perf_counter(), time.process_time()
    model = PixArtTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(torch.uint8).flatten()[::4096].sum()
    print(json.dumps([time.perf_counter() - began, time.process_time() - busy]))


def answer_of(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--recipe", default="w4a6")
    parser.add_argument("--scale", choices=("mse", "absmax"), default="mse")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, metavar=("FOLDER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load_and_measure(options.load, options.recipe, options.scale)
        return
    if options.time:
        load_and_time(options.time[0], options.time[1] == "cold")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, options.blocks)
        facts = answer_of("--load", folder, "--recipe", options.recipe, "--scale", options.scale)
        print(
            f"{facts['full'] / 1e6:.0f} MB in bfloat16, {facts['packed'] / 1e6:.0f} MB packed; quantizing while "
            f"loading peaked {(facts['peak'] - facts['packed']) / 1e6:.0f} MB above that, in {facts['seconds']:.1f} s\n"
        )
        places = {"bfloat16": folder, "packed": f"{folder}/packed"}
        print("| file | bfloat16: seconds (processor) | packed | packed / bfloat16 |\n| --- | --- | --- | --- |")
        for file in ("cold", "cached"):
            turns = [[answer_of("--time", place, file) for place in places.values()] for _ in range(options.turns)]
            medians = [[statistics.median(one) for one in zip(*each, strict=True)] for each in zip(*turns, strict=True)]
            cells = [f"{wall:.2f} ({busy:.2f})" for wall, busy in medians]
            ratio = statistics.median(small[0] / large[0] for large, small in turns)
            print(f"| {file} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
