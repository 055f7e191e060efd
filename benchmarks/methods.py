"""Recipes side by side on both embedded models, at W4A16 and W4A6: one markdown table a model and pair of formats.

    python benchmarks/methods.py [--recipes rtn,default,mine.yaml] [--models emoji-pixart,emoji-sd] [--bits W4A16,W4A6]
    python benchmarks/methods.py --one-grid --bits W3A16,W3A6,W4A6 [...]

Round to nearest (the recipe rtn64) is always the first row. Formats are the recipes' own, unless with --one-grid: then
all have the weights of the table's title (FP4 or INT3) in groups of 16 with scales in E4M3, 4.5 or 3.5 bits each, and a
scale for every 16 channels of an FP6 input, so that the rows differ in their methods alone. Block outputs, final
latents and PSNR are measured as in benchmarks/calibration.py, on prompts and timesteps that calibration does not have;
the error of blocks is the mean over blocks of each one's squared error over that of the first row. FID is between the
images and those of full precision, of 8 bits, through Inception. Seconds are those of quantizing, without capturing the
data, which the recipes of a model share, and of blocks that an interrupted benchmark had finished. Peak memory is that
of a process of its own, libraries included, while it quantizes. Every row is kept in OUT: what is there is not done
again; a recipe that fails is a line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from calibration import PROMPTS, Bench
from PIL import Image
from torch import Tensor

import dmquant
from dmquant.errors import UserError
from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.evaluation.networks import Networks
from dmquant.host.files import fingerprint, write_text
from dmquant.host.memory import peak_memory
from dmquant.pipelines.runs.calibration import calibration_data
from dmquant.pipelines.runs.footprint import footprint
from dmquant.pipelines.runs.settings import Options, Settings, resolve, with_recipe
from dmquant.pipelines.sweep.engines import Crew, local

MODELS = "emoji-pixart,emoji-sd"
BITS = "W4A16,W4A6"
WEIGHTS, ACTIVATIONS = {"W4": "fp4", "W3": "int3"}, {"A16": "none", "A6": "fp6"}
GRID = {
    "granularity": "group:16",
    "store": "e4m3",
    "activation_granularity": "group:16",
    "candidates": None,
    "activation_candidates": None,
}
NEAREST = "rtn64"
HEADER = [
    *("recipe", "bits a quantized weight", "block error, of nearest", "final latents", "latents, of nearest"),
    *("PSNR, dB", "dB over nearest", "FID to full precision", "seconds", "peak MB"),
]


@dataclass(frozen=True)
class Task:
    """A row to be measured by a process of its own, and the folder of its model."""

    settings: Settings
    prompts: str
    out: Path

    @property
    def path(self) -> Path:
        """Where the row is kept."""
        recipe, prompts = self.settings.recipe, self.settings.prompts
        key = fingerprint(recipe=recipe.to_dict(), dmquant=dmquant.__version__, prompts=prompts)
        return self.out / "methods" / f"{recipe.name}-{key[:8]}.json"


def measure(task: Task) -> dict[str, Any]:
    """What the recipe makes of the model; kept in the row's file."""
    settings = task.settings
    bench = Bench(task.out, len(settings.prompts), settings.model.name, task.prompts)
    if settings.recipe.calibrated:
        calibration_data(bench.pipeline, settings, task.out / "calibration", bench.console, bench.made_for["weights"])
    began = time.perf_counter()
    with peak_memory(settings.device) as peak:
        backbone, of_blocks = bench.quantized(settings)
    seconds = max(time.perf_counter() - began, of_blocks)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        measured = bench.measure(backbone, seconds, lambda images: save(images, scratch / "quantized"))
        _, _, images = bench.reference
        save(images, scratch / "fp")
        networks = Networks(settings.device, features=task.out / "features")
        fid = score_pairs(scratch / "fp", scratch / "quantized", ["fid_fp"], networks=networks)["fid_fp"]
    row = vars(measured) | {"fid": fid.value, "fid_missing": fid.reason, "peak_memory_bytes": peak.bytes}
    row["bits"] = footprint(backbone).bits_per_weight
    write_text(task.path, json.dumps(row))
    return row


def save(images: Tensor, folder: Path) -> None:
    """Write images in [0, 1] as PNG files of 8 bits."""
    folder.mkdir()
    for index, image in enumerate((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)):
        Image.fromarray(image.numpy()).save(folder / f"{index:05d}.png")


def rows_of(tasks: dict[str, Task], threads: int) -> dict[str, dict[str, Any] | str]:
    """Every row by the name of its recipe, from OUT where it is there; why not, for one that failed."""
    rows: dict[str, dict[str, Any] | str] = {}
    for name, task in tasks.items():
        if task.path.exists():
            rows[name] = json.loads(task.path.read_text())
            continue
        try:
            [(_, rows[name])] = local(measure, [task], Crew(1, threads))
        except UserError as error:
            rows[name] = str(error)
        if isinstance(rows[name], UserError):
            rows[name] = str(rows[name])
    return rows


def table(rows: dict[str, dict[str, Any] | str]) -> str:
    """Markdown; the first row is what the others are compared with."""
    nearest = next(iter(rows.values()))
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, row in rows.items():
        if isinstance(row, str) or isinstance(nearest, str):
            lines.append([name, f"failed: {row}" if isinstance(row, str) else "", *[""] * (len(HEADER) - 2)])
            continue
        blocks = fmean(own / other for own, other in zip(row["blocks"], nearest["blocks"], strict=True))
        fid = f"{row['fid']:.1f}" if row["fid"] is not None else f"not computed: {row['fid_missing']}"
        over = f"{row['psnr'] - nearest['psnr']:+.2f}"
        latents = [f"{row['latents']:.5f}", f"{row['latents'] / nearest['latents']:.3f}"]
        cost = [f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e6:.0f}"]
        lines.append([name, f"{row['bits']:.3f}", f"{blocks:.3f}", *latents, f"{row['psnr']:.2f}", over, fid, *cost])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tasks_of(
    options: Options, recipes: Sequence[str], title: str, one_grid: bool, iterations: int | None, out: Path
) -> dict[str, Task]:
    """The rows of the table of this title, such as W4A6, by name, round to nearest first."""
    base, tasks = resolve(options), {}
    weights, activations = WEIGHTS[title[:2]], ACTIVATIONS[title[2:]]
    for source in dict.fromkeys([NEAREST, *recipes]):
        settings = with_recipe(base, source, None, None)
        changed = {"activations": activations} if activations == "none" else {}
        if one_grid:
            changed = {"weights": weights, "activations": activations, **GRID}
        if iterations and settings.recipe.rounding.definition.LEARNS:
            changed["learning"] = settings.recipe.learning.model_copy(update={"iterations": iterations})
        recipe = settings.recipe.with_settings(**changed)
        tasks[recipe.name] = Task(replace(settings, recipe=recipe), options.prompts, out / options.model)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="rtn,default", help="names or YAML files, with commas")
    parser.add_argument("--models", default=MODELS, help="with commas")
    parser.add_argument("--bits", default=BITS, help="of W4A16, W4A6, W3A16 and W3A6, with commas; default %(default)s")
    parser.add_argument("--one-grid", action="store_true", help="all recipes on the grid of the title")
    parser.add_argument("--iterations", type=int, help="steps of all that learn; default: the recipe's own")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", default=PROMPTS, help="what images are made of; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    if not options.one_grid and "W3" in options.bits:
        parser.error("W3 is a grid for all recipes: add --one-grid")
    recipes = [source.strip() for source in options.recipes.split(",") if source.strip()]
    for model in options.models.split(","):
        measured = Options(model, recipe=NEAREST, prompts=options.prompts, num_prompts=options.images, device="cpu")
        for title in options.bits.split(","):
            tasks = tasks_of(measured, recipes, title, options.one_grid, options.iterations, options.out.resolve())
            head = f"{model}, {title}, {options.images} images of {options.prompts}"
            print(f"\n{head}\n\n{table(rows_of(tasks, options.threads))}", flush=True)


if __name__ == "__main__":
    main()
