"""On a GPU: weights quantized a second, and the time of whole images, full precision and quantized.

    python benchmarks/gpu_models.py [FOLDER ...] [--device cuda]

FOLDERs are models that `dmquant run emoji-pixart` saved. Each is called by the kernels that its layers choose, in both
ways to keep weights, and by the reference alone, in turns with full precision; ratios are medians over turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from turns import table

from dmquant import kernels
from dmquant.pipelines.models.loading import embedded_folder
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.runs.footprint import kernels_used
from dmquant.qtensor import quantize_tensor

TURNS, STEPS = 10, 20
CALL = {"use_resolution_binning": False, "clean_caption": False}
WEIGHTS = [
    ("fp4", "group:64", "absmax", "bf16"),
    ("fp4", "group:64", "mse", "bf16"),
    ("int4", "group:16", "mse", "int"),
]
WEIGHTS += [("nvfp4", "group:16", "mse", "e4m3")]


def timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quantizing(device: torch.device) -> str:
    weight, rows = torch.randn(4608, 1152, device=device), []
    for settings in WEIGHTS:
        call = lambda settings=settings: quantize_tensor(weight, *settings)  # noqa: E731
        call()
        seconds = statistics.median(timed(call, device) for _ in range(TURNS))
        rows.append([", ".join(settings), f"{1e3 * seconds:.1f}", f"{weight.numel() / seconds / 1e6:,.0f}"])
    return table(["weights 4608 x 1152", "ms", "M weights a second"], rows)


def images(folders: list[Path], device: torch.device) -> str:
    from diffusers import DiffusionPipeline  # after dmquant, which mends what torchvision may lack

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    own = embedded_folder(registered_models()["emoji-pixart"].source)
    pipes = {"full precision": (DiffusionPipeline.from_pretrained(own, dtype=dtype), None, "memory")}
    for folder in folders:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
        name = folder.parent.name
        pipes |= {f"{name}, weights in {kept}": (pipe, None, kept) for kept in kernels.KEPT}
        pipes[f"{name}, reference"] = pipe, "reference", "memory"
    for pipe, *_ in pipes.values():
        pipe.to(device).set_progress_bar_config(disable=True)

    def call(name: str) -> None:
        pipe, kernel, kept = pipes[name]
        with kernels.forced(kernel), kernels.keeping_weights(kept):
            generator = torch.Generator().manual_seed(0)
            pipe("a red apple", num_inference_steps=STEPS, generator=generator, **CALL)
        used[name] = ", ".join(f"{one} {count}" for one, count in kernels_used(pipe.transformer).items())

    seconds, used = {name: [] for name in pipes}, {}
    for turn in range(TURNS + 1):  # the first chooses kernels and makes their weights
        for name in pipes:
            spent = timed(lambda name=name: call(name), device)
            seconds[name] += [spent] if turn else []
    rows = []
    for name in pipes:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["full precision"], strict=True))
        rows.append([name, f"{1e3 * statistics.median(seconds[name]):.0f}", f"{ratio:.2f}", used[name]])
    return table([f"image of {STEPS} steps", "ms", "/ full precision", "kernels, layers"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    arguments = parser.parse_args()
    with torch.inference_mode():
        print(quantizing(arguments.device), end="\n\n")
        print(images(arguments.folders, arguments.device))


if __name__ == "__main__":
    main()
