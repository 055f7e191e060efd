"""Round-to-nearest in FP and INT, at several bits, against one set of full-precision images: a markdown table.

    python benchmarks/rtn_baseline.py --scale mse --out runs/baseline-mse

Every row is `dmquant run MODEL` with other formats in the same run folder, so the full-precision images are made once;
each row's report is kept as OUT/NAME.json, and a row that is there is not measured again.
"""

import argparse
import json
import shutil
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


def measure(model: str, weights: str, activations: str, folder: Path, options: list[object]) -> dict:
    kept = folder / f"{weights}-{activations}.json"
    if not kept.exists():
        command = [sys.executable, "-m", "dmquant", "run", model, "--w", weights, "--a", activations]
        subprocess.run([*command, "--out", str(folder / "run"), *map(str, options)], check=True)
        shutil.copy(folder / "run" / "report.json", kept)
    return json.loads(kept.read_text())


def interval(metric: dict, digits: int) -> str:
    if metric["value"] is None:
        return f"not computed: {metric['reason']}"
    low, high = metric.get("low"), metric.get("high")
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if low is not None else ""
    return f"{metric['value']:.{digits}f}{spread}"


def row(weights: str, activations: str, report: dict) -> list[str]:
    (recipe,) = report["recipes"].values()
    metrics, size = recipe["metrics"], recipe["size_bytes"]
    return [
        f"{weights}, {activations}",
        f"{recipe['bits_per_weight']:.2f}",
        f"{size / 1e6:.2f}",
        f"{size / report['reference']['size_bytes']:.2f}",
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
    recipe = options.out / f"rtn-{options.scale}.yaml"
    Recipe.load("rtn").with_settings(scale=options.scale).save(recipe)
    run_options = ["--recipe", recipe, "--prompts", options.prompts, "--num-prompts", options.num_prompts]
    rows = [HEADER, ["---"] * len(HEADER)]
    for weights, activations in ROWS:
        report = measure(options.model, weights, activations, options.out, run_options)
        rows.append(row(weights, activations, report))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main()
