"""Time and memory of exporting a quantized model for other engines, and of reading it back, beside copying its file.

    python benchmarks/exchange.py [--blocks 80] [--to comfyui,torchao,modelopt] [--turns 5]

A transformer of PixArt-Sigma's width with random NVFP4 codes, 1 GB with 80 blocks, is saved to a temporary folder.
Each turn copies its weight file (`shutil.copyfile`), then exports it to every format and reads every tensor of what
was written, without decoding, all in fresh processes and one thread; what was written counts when it is on the disk
(fsync).
Memory is the anonymous memory (Linux) above that before, at its peak, beside the largest layer of the model.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loading_memory import PIXART_SIGMA, anonymous_bytes

RECIPE = {"w": "nvfp4", "a": "none"}


def make_model(folder: Path, blocks: int) -> None:
    """Save a pipeline folder with a quantized transformer of random codes, and nothing else that has weights."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    from dmquant.diffusers.quantizer import QuantConfig, empty_layers_, mark_quantized
    from dmquant.layers import QUANTIZED

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**PIXART_SIGMA, num_layers=blocks)
    config = QuantConfig("rtn", **RECIPE)
    empty_layers_(model, config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype == torch.uint8 and not name.endswith(".scale_base"):
            low, high = (0x28, 0x68) if name.endswith(".scale") else (0, 256)  # E4M3 scales of ordinary size
            tensor.data = torch.randint(low, high, tensor.shape, dtype=torch.uint8, generator=generator)
        elif tensor.dtype != torch.uint8:
            tensor.data = torch.randn(tensor.shape, generator=generator)
    for layer in model.modules():
        if isinstance(layer, tuple(QUANTIZED.values())):
            layer.scale_base.data = torch.full((1, 1), 1e-4, dtype=torch.float32).view(torch.uint8)
    mark_quantized(model, config.recipe)
    model.save_pretrained(folder / "transformer", max_shard_size="100GB")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    parts = {"transformer": type(model).__name__, "scheduler": "DPMSolverMultistepScheduler"}
    index = {"_class_name": "PixArtSigmaPipeline"} | {name: ["diffusers", kind] for name, kind in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))


def on_disk(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of some work, and bytes of anonymous memory that it took at its peak above what there was."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, busy = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    done.set()
    watcher.join()
    return {"seconds": seconds, "busy": busy, "peak": max(0, peak - before)}


def work(kind: str, source: Path, target: Path) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401  (libraries are imported before the clock starts)
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel  # noqa: F401

    from dmquant.exchange.formats import writable
    from dmquant.pipelines.models.opening import open_foreign, open_source

    torch.set_num_threads(1)
    way, _, name = kind.partition(":")
    if way == "copy":
        file = next((source / "transformer").glob("*.safetensors"))
        return measured(lambda: (shutil.copyfile(file, target), on_disk(target)))
    if way == "export":
        return measured(
            lambda: (writable(name).export(open_source(source), target, lambda *told: None), on_disk(target))
        )

    def read() -> None:
        found = open_foreign(target).found
        for tensor in found.tensors:
            found.tensor(tensor).reshape(-1).view(torch.uint8)[::4096].sum()

    return measured(read)


def in_a_process(kind: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--do", kind, str(source), str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--to", default="comfyui,torchao,modelopt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        kind, source, target = options.do
        print(json.dumps(work(kind, Path(source), Path(target))))
        return
    formats = options.to.split(",")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model", Path(folder) / "target"
        make_model(source, options.blocks)
        size = sum(file.stat().st_size for file in (source / "transformer").glob("*.safetensors"))
        layer = 9 * PIXART_SIGMA["cross_attention_dim"] ** 2 * 4 // 16  # bytes of the largest: codes and scales
        print(f"{size / 1e9:.2f} GB; the largest layer has {layer / 1e6:.1f} MB\n")
        kinds = ["copy", *(f"{way}:{name}" for name in formats for way in ("export", "import"))]
        turns = []
        for _ in range(options.turns):
            turns.append({})
            for kind in kinds:
                if not kind.startswith("import"):
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                turns[-1][kind] = in_a_process(kind, source, target)
        print("| | seconds | of copying | processor seconds | memory at its peak, MB |\n|" + " --- |" * 5)
        for kind in kinds:
            seconds = statistics.median(turn[kind]["seconds"] for turn in turns)
            ratio = statistics.median(turn[kind]["seconds"] / turn["copy"]["seconds"] for turn in turns)
            busy = statistics.median(turn[kind]["busy"] for turn in turns)
            peak = max(turn[kind]["peak"] for turn in turns)
            cells = f"{seconds:.2f} | {ratio:.2f} | {busy:.2f} | {peak / 1e6:.1f}"
            print(f"| {kind.replace(':', ' ')} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
