"""Rounding methods on one block of emoji-pixart, from nearest rounding and from GPTQ's solution: a markdown table.

    python benchmarks/one_block.py [--weights int3] [--prompts 16] [--iterations 300] [--rows METHOD:BEGIN:RATE,...]

The second block alone is quantized, weights only, on the grid of `default`: groups of 16, scales in E4M3. BEGIN is
`nearest`, on scales by output error (`scale: hessian`), or `gptq`, as `default` solves it (`scale: lean`, four sweeps).
RATE is the learning rate. Errors are those of the block's output on prompts that nothing is learned from, over that of
nearest rounding on scales by output error; the roundings that they are of are the best of 12 tries along the way, which
flatters learning a little. Seconds are processor time, of one thread. Every row is kept in OUT: what is there is not
done again.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from calibration import BATCH, Bench

from dmquant.calib.blocks.engine import calibrate_
from dmquant.calib.data.sampling import Sampling
from dmquant.host.files import fingerprint, write_text
from dmquant.pipelines.runs.calibration import FIRST_SEED

BLOCK = "transformer_blocks.1"
SOLVED = {"method": "gptq", "damping": 0.1, "sweeps": 4}
NEAREST = "autoround:nearest:0.003"
ROWS = [
    *("gptq::0", NEAREST, "adaround:nearest:0.1", "flexround:nearest:0.003", "lrq:nearest:0.01"),
    *("adaround:gptq:0.01", "flexround:gptq:0.0003", "lrq:gptq:0.001", "autoround:gptq:0.0003"),
]
STEPS_PER_PROMPT, BATCH_SIZE, TRIES = 10, 4, 12


@dataclass(frozen=True)
class Row:
    """One way to round the block; errors are mean squared ones of its output on held-out prompts."""

    nearest_error: float
    error: float
    best_step: int
    seconds: float


def recipe_of(text: str, options: argparse.Namespace) -> dict:
    """Settings of a row METHOD:BEGIN:RATE."""
    method, begin, rate = text.split(":")
    rounding = SOLVED if method == "gptq" else {"method": method} | ({"begin": SOLVED} if begin == "gptq" else {})
    learning = {"iterations": options.iterations, "batch_size": BATCH_SIZE, "checks": TRIES}
    return {
        "weights": options.weights,
        "activations": "none",
        "granularity": "group:16",
        "store": "e4m3",
        "scale": "hessian" if begin == "nearest" else "lean",
        "rounding": rounding,
        "learning": learning | ({"learning_rate": float(rate)} if float(rate) else {}),
        "rules": [{"match": "*", "keep": True}, {"match": f"{BLOCK}.*", "keep": False}],
    }


def measure(bench: Bench, text: str, options: argparse.Namespace) -> Row:
    """The row of this text, from OUT where it is there."""
    settings = recipe_of(text, options)
    key = fingerprint(recipe=settings, prompts=options.prompts)[:8]
    path = bench.out / "one-block" / f"{text.replace(':', '-')}-{key}.json"
    if not path.exists():
        prompts = bench.settings.calibration_prompts[: options.prompts]
        store = bench.capture(prompts, Sampling("stratified", STEPS_PER_PROMPT, 0.125), FIRST_SEED)
        began = time.process_time()
        done = calibrate_(
            bench.copy(),
            bench.settings.recipe.with_settings(name="one-block", **settings),
            store,
            blocks=bench.blocks,
            folder=bench.out / "calibration" / path.stem,
            made_for=bench.made_for,
            bar=bench.console.bar,
        )
        [task] = [task for block in done.blocks for task in block["tasks"]]
        seconds = time.process_time() - began
        row = Row(task["nearest_error"], task["error"], task["best_step"], seconds)
        write_text(path, json.dumps(asdict(row)))
    return Row(**json.loads(path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int3", help="their format; default %(default)s")
    parser.add_argument("--prompts", type=int, default=16, help="to calibrate with; default %(default)s")
    parser.add_argument("--iterations", type=int, default=300, help="default %(default)s")
    parser.add_argument("--rows", default=",".join(ROWS), help="METHOD:BEGIN:RATE, with commas")
    parser.add_argument("--out", type=Path, default=Path("runs/one-block"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.out, BATCH)
    nearest = measure(bench, NEAREST, options).nearest_error
    print("| method | begins at | rate | error, of nearest | kept | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for text in options.rows.split(","):
        row, (method, begin, rate) = measure(bench, text, options), text.split(":")
        kept = f"step {row.best_step} of {options.iterations}" if float(rate) else ""
        print(f"| {method} | {begin} | {rate} | {row.error / nearest:.3f} | {kept} | {row.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
