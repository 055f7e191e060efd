"""Peak memory of calibration against what is asked for before it begins, by recipe and size of the activations.

    python benchmarks/calibration_memory.py [--recipes adaround,gptq,default,svd] [--width 768] [--latents 16,64]

A PixArt transformer of one block in bfloat16 with random weights, latents and texts, two samples a batch; learning is
short. `asked` is the least --memory-budget that is not refused, with which the row is run: what waits between blocks is
on disk then. `peak` is the resident memory above that before calibrating; every row is a process of its own. The
constants of calib/blocks/budget.py are chosen by this table.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from calibration_cost import RandomData, no_bar

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.errors import UsageError
from dmquant.host.memory import peak_memory, resident_memory, return_freed_memory
from dmquant.pipelines.runs.bounds import parse_size

TEXT, BATCH, LEARNING, HELD_OUT = 256, 2, 6, 2


def measure(name: str, width: int, side: int) -> dict[str, int]:
    """Bytes asked for and bytes of the peak, in this process."""
    from diffusers import PixArtTransformer2DModel

    from dmquant.calib.blocks.engine import calibrate_
    from dmquant.diffusers.families.pixart import FAMILY

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = PixArtTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=width,
        sample_size=side,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    torch.set_default_dtype(torch.float32)
    recipe = dmquant.Recipe.load(name)
    if recipe.rounding.method == "adaround":  # learning is what takes memory, and choosing what takes time
        recipe = recipe.with_settings(scale="absmax", candidates=None)
    learning = recipe.learning.model_copy(update={"iterations": 3, "batch_size": BATCH, "checks": 1})
    recipe = recipe.model_copy(update={"learning": learning}).keeping(FAMILY.keep)
    data = RandomData(side, TEXT, LEARNING, HELD_OUT)

    def calibrate(budget: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrate_(
                model,
                recipe,
                data,
                blocks=FAMILY.blocks(model),
                folder=Path(folder),
                made_for={},
                memory_budget=budget,
                bar=no_bar,
            )

    try:
        calibrate(1)
    except UsageError as error:
        asked = parse_size(str(error).split("--memory-budget ")[1].split(" ")[0], "budget")
    gc.collect()
    return_freed_memory()
    before = resident_memory()
    with peak_memory("cpu") as peak:
        calibrate(asked)
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return {"asked": asked, "peak": peak.bytes - before, "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="adaround,gptq,default,svd")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--latents", default="16,64")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.recipes, options.width, int(options.latents))))
        return
    print("| recipe | image tokens | asked, MB | peak, MB | peak over asked |\n| --- | --- | --- | --- | --- |")
    for recipe in options.recipes.split(","):
        for side in options.latents.split(","):
            command = [sys.executable, __file__, "--one", "--recipes", recipe, "--latents", side]
            command += ["--width", str(options.width)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            row = json.loads(answer)
            cells = [recipe, (int(side) // 2) ** 2, row["asked"] // 10**6, row["peak"] // 10**6]
            print(f"| {' | '.join(map(str, cells))} | {row['peak'] / row['asked']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
