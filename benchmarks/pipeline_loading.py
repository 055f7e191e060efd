"""Loading a whole pipeline of PixArt-Sigma's architecture, T5-XXL included: peak memory and time, packed and not.

    python benchmarks/pipeline_loading.py [--encoder-blocks 24] [--blocks 28] [--recipe w4a16] [--turns 3]

Writes transformer, T5-XXL encoder (in shards) and VAE with random bfloat16 weights to a temporary folder (11 GB at full
size). A fresh process loads it with a `PipelineQuantizationConfig` and its anonymous memory is sampled (Linux): pages
that are mapped from files, as those of layers that stay in bfloat16, are not counted. Then full precision
and what was saved packed are loaded in turn, each in a fresh process, from files that the system was told to forget and
from files that it remembers, until every page of the weights has been read; their peak is all resident memory (VmHWM)
above that before the call.
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

T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "vocab_size": 32128}
SHARD_BLOCKS = 4
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": [None, None],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PARTS = ("transformer", "text_encoder", "vae")


def write_pipeline(folder: Path, blocks: int, encoder_blocks: int) -> None:
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from loading_memory import write_checkpoint

    write_checkpoint(str(folder / "transformer"), blocks)
    torch.set_default_dtype(torch.bfloat16)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    write_encoder(folder / "text_encoder", encoder_blocks)
    (folder / "model_index.json").write_text(json.dumps(INDEX))


def write_encoder(folder: Path, blocks: int) -> None:
    """Shards of a few blocks, a tensor at a time: the encoder alone is 9.5 GB."""
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**T5_XXL, num_layers=blocks, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5EncoderModel(config).state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight")  # is shared.weight
    where = {name: int(name.split(".")[2]) // SHARD_BLOCKS if ".block." in name else 0 for name in shapes}
    count = max(where.values()) + 1
    files = {name: f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for name, shard in where.items()}
    for file in sorted(set(files.values())):
        named = [name for name in shapes if files[name] == file]
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in named}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def status(line: str) -> int:
    found = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in found if one.startswith(line))


def pipeline_of(folder: str, **more: Any) -> Any:
    import torch
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.bfloat16, **more)


def tensors_of(pipeline: Any) -> list[Any]:
    modules = [getattr(pipeline, part) for part in PARTS]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def quantize_and_measure(folder: str, recipe: str) -> None:
    from diffusers import PipelineQuantizationConfig

    kwargs = {"recipe": dmquant.Recipe.load(recipe).with_settings(scale="absmax").to_dict()}
    config = PipelineQuantizationConfig(quant_backend="dmquant", quant_kwargs=kwargs)
    before, peak, done = status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    pipeline = pipeline_of(folder, quantization_config=config)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    packed = sum(tensor.nbytes for tensor in tensors_of(pipeline))
    full = sum(file.stat().st_size for file in Path(folder).glob("*/*.safetensors"))
    pipeline.save_pretrained(f"{folder}/packed")
    print(json.dumps({"packed": packed, "peak": peak - before, "full": full, "seconds": seconds}))


def load_and_time(folder: str, cold: bool) -> None:
    """Write the seconds from the call until each page of each weight was read, and the peak of resident memory."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel

    _ = (transformers.T5EncoderModel, AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel)  # imported lazily
    for file in Path(folder).glob("*/*.safetensors") if cold else ():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, began = status("VmRSS"), time.perf_counter()
    pipeline = pipeline_of(folder)
    for tensor in tensors_of(pipeline):
        tensor.detach().view(torch.uint8).flatten()[::4096].sum()
    print(json.dumps([time.perf_counter() - began, status("VmHWM") - before]))


def answer_of(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--encoder-blocks", type=int, default=24)
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quantize", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, metavar=("FOLDER", "FILES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quantize:
        quantize_and_measure(options.quantize, options.recipe)
        return
    if options.time:
        load_and_time(options.time[0], options.time[1] == "cold")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(Path(folder), options.blocks, options.encoder_blocks)
        facts = answer_of("--quantize", folder, "--recipe", options.recipe)
        print(
            f"{facts['full'] / 1e9:.2f} GB in bfloat16, {facts['packed'] / 1e9:.2f} GB packed; anonymous memory peaked "
            f"at {facts['peak'] / 1e9:.2f} GB while quantizing on load, in {facts['seconds']:.0f} s\n",
            flush=True,
        )
        places = {"bfloat16": folder, "packed": f"{folder}/packed"}
        print("| files | bfloat16: seconds, peak | packed | seconds, packed / bfloat16 | peak |\n|---|---|---|---|---|")
        for files in ("cold", "cached"):
            turns = [[answer_of("--time", place, files) for place in places.values()] for _ in range(options.turns)]
            cells = [
                f"{statistics.median(one[0] for one in each):.1f}, "
                f"{statistics.median(one[1] for one in each) / 1e9:.2f} GB"
                for each in zip(*turns, strict=True)
            ]
            ratios = [statistics.median(small[i] / large[i] for large, small in turns) for i in (0, 1)]
            print(f"| {files} | {' | '.join(cells)} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
