"""Round-to-nearest in FP and INT, at several bits, against one set of full-precision images: a markdown table.

    python benchmarks/rtn_baseline.py --scale mse --out runs/baseline-mse

The rows are the recipes of one `dmquant compare` in OUT/compare, which goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dmquant.recipe import Recipe

ROWS = [
    ("fp8", "fp8"),
    ("int8", "int8"),
    ("fp4", "fp8"),
    ("int4", "int8"),
    ("fp4", "fp6"),
    ("int4", "int6"),
    ("fp4", "none"),
    ("int4", "none"),
    ("mxfp4", "mxfp6"),
    ("nvfp4", "fp6"),
]
HEADER = ["weights, activations", "bits/weight", "in files, MB", "of 16 bit", "PSNR, dB", "SSIM", "FID to FP"]


def interval(metric: dict, digits: int) -> str:
    if metric["value"] is None:
        return f"not computed: {metric['reason']}"
    low, high = metric.get("low"), metric.get("high")
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if low is not None else ""
    return f"{metric['value']:.{digits}f}{spread}"


def row(formats: tuple[str, str], recipe: dict, reference: dict) -> list[str]:
    metrics, size = recipe["metrics"], recipe["size_bytes"]
    return [
        ", ".join(formats),
        f"{recipe['bits_per_weight']:.2f}",
        f"{size / 1e6:.2f}",
        f"{size / reference['size_bytes']:.2f}",
        interval(metrics["psnr"], 2),
        interval(metrics["ssim"], 3),
        interval(metrics["fid_fp"], 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-pixart")
    parser.add_argument("--prompts", default="emoji-held-out", help="what images are made of; default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--scale", choices=("mse", "absmax"), default="mse")
    parser.add_argument("--out", type=Path, default=Path("runs/baseline"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for weights, activations in ROWS:
        name = f"{weights}-{activations}"
        files.append(options.out / f"{name}.yaml")
        recipe = Recipe.load("rtn64", w=weights, a=activations)
        recipe.with_settings(name=name, scale=options.scale).save(files[-1])
    command = [sys.executable, "-m", "dmquant", "compare", options.model, "--recipes", ",".join(map(str, files))]
    command += ["--prompts", options.prompts, "--num-prompts", str(options.num_prompts)]
    command += ["--metrics", "psnr,ssim,fid_fp", "--out", str(options.out / "compare")]
    subprocess.run(command, check=True)
    report = json.loads((options.out / "compare/report.json").read_text())
    rows = [HEADER, ["---"] * len(HEADER)]
    for formats, recipe in zip(ROWS, report["recipes"].values(), strict=True):
        rows.append(row(formats, recipe, report["reference"]))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main()
