"""Memory of tuning weights by Q-GaLore and by AdamW: optimizer, and resident at its peak, each in a process of its own.

    python benchmarks/tuning_memory.py [--width 1024] [--blocks 6] [--steps 60] [--tokens 64]

A stack of feed-forward blocks (width, 4 x width, width) in INT4 learns from the same stack in full precision, on random
inputs, from latent weights in float32 by `torch.optim.AdamW`, all gradients held until its step, as usual; and by
Q-GaLore at a quarter of the rank, in 8 bits, gradients freed layer by layer, blocks computed again. Resident memory is
the highest of the process over what it held before, a step of a small model included; losses are means of the
last tenth of the steps over the first. Rates are each optimizer's best of those tried.
"""

import argparse
import json
import multiprocessing
import time
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.student import Student
from dmquant.calib.whole.teacher import checkpointing
from dmquant.convert import quantize_
from dmquant.host.memory import peak_memory, resident_memory, return_freed_memory
from dmquant.recipe import Recipe

RATES = (4.0, 8.0, 16.0)  # factors of those of `dmquant tune`


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def tuned(method: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """What one optimizer takes and reaches."""
    torch.set_num_threads(1)
    warm_up()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks)))
    inputs = torch.randn(32, options.tokens, options.width)
    with torch.no_grad():
        targets = torch.stack([model(x) for x in inputs])
    quantize_(model, Recipe(name="int4", keep="none", weights="int4", activations="fp6", granularity="group:16"))
    return_freed_memory()
    began, losses = resident_memory(), []
    with peak_memory("cpu") as peak:
        student = Student(model, ["weights"], Lean() if method == "qgalore" else None)
        adamw = adamw_of(student, rate) if method == "adamw" else None
        seconds = time.process_time()
        again = [str(number) for number in range(options.blocks if method == "qgalore" else 0)]
        with checkpointing(model, again), student.learning():
            for step in range(options.steps):
                left = 1 - step / options.steps
                student.set_rates(0.0 if adamw else rate * left)
                loss = (model(inputs[step % 32]) - targets[step % 32]).square().mean()
                loss.backward()
                student.step()
                losses.append(loss.item())
                if adamw:
                    for group in adamw.param_groups:
                        group["lr"] = group["begun"] * left
                    adamw.step()
                    adamw.zero_grad()
        seconds = time.process_time() - seconds
    last = losses[-max(1, options.steps // 10) :]
    held = student.optimizer_bytes if adamw is None else adamw_bytes(adamw)
    return {
        "method": method,
        "rate": rate,
        "optimizer": held,
        "resident": peak.bytes - began,
        "loss": sum(last) / len(last) / losses[0],
        "seconds": seconds / options.steps,
    }


def warm_up() -> None:
    """Let a step of a small model load what libraries load late, which is no memory of an optimizer's."""
    model = nn.Sequential(Block(128))
    quantize_(model, Recipe(name="int4", keep="none", weights="int4", activations="fp6", granularity="group:16"))
    student = Student(model, ["weights"], Lean())
    with checkpointing(model, ["0"]), student.learning():
        model(torch.randn(4, 8, 128)).square().mean().backward()
    student.step()


def adamw_of(student: Student, rate: float) -> torch.optim.AdamW:
    """torch's own optimizer for the latent weights, which hold their gradients until it steps."""
    groups = []
    for name, held in student.held.items():
        parameter = held.read()
        parameter._post_accumulate_grad_hooks.clear()
        groups.append({"params": [parameter], "lr": student.rates[name] * rate, "begun": student.rates[name] * rate})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def adamw_bytes(optimizer: torch.optim.AdamW) -> int:
    """Bytes of its state."""
    return sum(tensor.nbytes for of in optimizer.state.values() for tensor in of.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="with commas")
    options = parser.parse_args()
    best = {}
    for method in ("adamw", "qgalore"):
        rows = []
        for rate in map(float, options.rates.split(",")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(tuned, (method, rate, options)))
            print(json.dumps(rows[-1]), flush=True)
        best[method] = min(rows, key=lambda row: row["loss"])
    print("| | AdamW | Q-GaLore | ratio |\n| --- | --- | --- | --- |")
    for name, title, unit, digits in (
        ("optimizer", "optimizer, MB", 1e6, 1),
        ("resident", "resident at the peak, MB", 1e6, 1),
        ("loss", "loss, of the first", 1, 4),
        ("seconds", "seconds a step, of a processor", 1, 2),
    ):
        one, other = (best[method][name] / unit for method in ("adamw", "qgalore"))
        print(f"| {title} | {one:.{digits}f} | {other:.{digits}f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
