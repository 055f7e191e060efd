"""Seconds of loading a saved pipeline with and without its checksums, and of reading its files alone.

    python benchmarks/verified_loading.py [--blocks 28] [--repeats 9] [--dtype bf16]

Writes a pipeline with a transformer of PixArt-Sigma's width and random weights to a temporary folder. Each way is timed
in turn, in one process; shown is the fastest of each. Cold: the system has been told to drop the files from its cache
(Linux), and no hash of them is remembered.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dmquant  # before diffusers, for which it makes torchvision importable


def write_pipeline(folder: Path, blocks: int) -> None:
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from loading_memory import PIXART_SIGMA

    torch.set_default_dtype(torch.bfloat16)
    transformer = PixArtTransformer2DModel(**PIXART_SIGMA, num_layers=blocks)
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(16,))
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": DPMSolverMultistepScheduler()}
    dmquant.quantize_(transformer, dmquant.Recipe.load("w8a8").with_settings(scale="absmax"))
    dmquant.save_pipeline(PixArtSigmaPipeline(transformer=transformer, **parts), folder)


def read(folder: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            while file.readinto(buffer):
                pass


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drop the files from the system's cache, and what this process knows of them."""
    from dmquant.host import caches, hashes

    hashes._in_this_process.clear()
    Path(os.environ[caches.VARIABLE], "hashes.json").unlink(missing_ok=True)
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    import torch

    from dmquant.host import checksums

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as cache:
        os.environ["DMQUANT_CACHE"] = cache
        folder = Path(name)
        write_pipeline(folder, options.blocks)
        ways = {
            "reading its files": lambda: read(folder),
            "inspect --verify": lambda: checksums.faults(folder),
            "load, verify=False": lambda: dmquant.load_pipeline(folder, verify=False, dtype=dtype),
            "load, verify=True": lambda: dmquant.load_pipeline(folder, dtype=dtype),
        }
        times = {(way, state): [] for state in ("cold", "warm") for way in ways}
        for _ in range(options.repeats):
            for way, work in ways.items():
                forget(folder)
                times[way, "cold"].append(seconds(work))
                times[way, "warm"].append(seconds(work))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size / 1e6:.0f} MB")
    for (way, state), taken in times.items():
        print(f"{state}: {way:20}  {min(taken):7.3f} s")


if __name__ == "__main__":
    main()
