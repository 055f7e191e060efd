"""Time and peak memory of calibration against the number of blocks: a PixArt transformer of width 1152.

    python benchmarks/calibration_cost.py [--blocks 2,4,8,16,28] [--memory-budget 2GB]

Weights, latents and texts are random and learning is short: this is about cost alone. Every row is a process of its
own; bfloat16, one row of 16x16 latents and 32 text tokens a sample. Seconds are those of calibrating, without building
the model; peak memory is the resident memory of the whole process, libraries included.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.calib.data.sampling import Sample
from dmquant.host.memory import peak_memory
from dmquant.pipelines.runs.bounds import parse_size

WIDTH, HEADS, TEXT = 1152, 16, 4096
TOKENS = 32
BESIDES = 1_000_000_000  # bytes allowed beside model and budget: libraries, allocator
LEARNING_SAMPLES, HELD_OUT_SAMPLES, BATCH, ITERATIONS = 8, 2, 2, 4


class RandomData:
    """Calls of the backbone with random arguments, as a CalibrationStore gives them."""

    rows, weights, key = 1, None, "random"

    def __init__(
        self, side: int = 16, text: int = TEXT, learning: int = LEARNING_SAMPLES, held_out: int = HELD_OUT_SAMPLES
    ) -> None:
        """Latents of `side` squared, `text` channels of each text token, and samples to learn from and held out."""
        self.steps = learning + held_out
        self.samples = [Sample(step, step, step >= learning) for step in range(self.steps)]
        self.timesteps = [999.0 - 99 * step for step in range(self.steps)]
        draw = torch.Generator().manual_seed(0)
        self.latents = torch.randn(self.steps, 4, side, side, generator=draw, dtype=torch.bfloat16)
        self.texts = torch.randn(self.steps, TOKENS, text, generator=draw, dtype=torch.bfloat16)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> tuple[tuple, dict[str, Any]]:
        chosen = list(indices)
        arguments = {
            "hidden_states": self.latents[chosen],
            "encoder_hidden_states": self.texts[chosen],
            "timestep": torch.tensor([self.timesteps[index] for index in chosen]),
            "encoder_attention_mask": torch.ones(len(chosen), TOKENS, dtype=torch.bfloat16),
        }
        given: dict[str, Any] = {name: tensor.to(device) for name, tensor in arguments.items()}
        return (), given | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}


@contextlib.contextmanager
def no_bar(title: str) -> Iterator[Any]:
    yield lambda done, total, what=None, speed="": None


def calibrate_one(blocks: int, budget: int) -> dict[str, float]:
    """Seconds, and bytes of the peak and of the model, in this process."""
    from diffusers import PixArtTransformer2DModel

    from dmquant.calib.blocks.engine import calibrate_
    from dmquant.diffusers.families.pixart import FAMILY

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=WIDTH,
        sample_size=128,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    torch.set_default_dtype(torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    recipe = dmquant.Recipe.load("rtn64", a="none").with_settings(
        name="cost",
        scale="absmax",
        rounding="adaround",
        learning={"iterations": ITERATIONS, "batch_size": BATCH, "checks": 1},
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, peak_memory("cpu") as peak:
        calibrated = calibrate_(
            model,
            recipe.for_model(FAMILY.known(model)),
            RandomData(),
            blocks=FAMILY.blocks(model),
            folder=Path(folder),
            made_for={},
            memory_budget=budget,
            bar=no_bar,
        )
        seconds = time.perf_counter() - began
    a_block = [block["seconds"] for block in calibrated.blocks]
    return {"seconds": seconds, "first": a_block[0], "last": a_block[-1], "peak": peak.bytes, "model": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="2,4,8,16,28")
    parser.add_argument("--memory-budget", default="2GB")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    budget = parse_size(options.memory_budget, "--memory-budget")
    if options.one:
        print(json.dumps(calibrate_one(options.one, budget)))
        return
    lines = [
        ["blocks", "seconds", "a block", "first", "last", "peak, MB", "model, MB", "peak - model, MB", "allowed, MB"]
    ]
    lines.append(["---"] * len(lines[0]))
    for line in lines:
        print(f"| {' | '.join(line)} |")
    rows = []
    for blocks in map(int, options.blocks.split(",")):
        command = [sys.executable, __file__, "--one", str(blocks), "--memory-budget", options.memory_budget]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        row = json.loads(answer)
        rows.append((blocks, row["seconds"]))
        sizes = [row["peak"], row["model"], row["peak"] - row["model"], budget + BESIDES]
        seconds = [row["seconds"], row["seconds"] / blocks, row["first"], row["last"]]
        cells = [str(blocks), *(f"{each:.1f}" for each in seconds), *(f"{size / 1e6:.0f}" for size in sizes)]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{fit(rows)}")


def fit(rows: list[tuple[int, float]]) -> str:
    """The straight line through the seconds, and how far they are from it."""
    blocks, seconds = torch.tensor(rows, dtype=torch.float64).T
    design = torch.stack([blocks, torch.ones_like(blocks)], dim=1)
    line = torch.linalg.lstsq(design, seconds[:, None]).solution
    off = ((design @ line).squeeze(1) - seconds).abs() / seconds
    return f"{line[0].item():.2f} s a block + {line[1].item():.2f} s; the rows lie within {off.max():.1%} of this line"


if __name__ == "__main__":
    main()
