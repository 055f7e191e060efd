"""Online against static activation scales, by timestep ranges: what `dmquant compare` says of them.

    python benchmarks/static_activations.py --out runs/static-activations

Weights are INT8 in groups of 64 (43 dB by themselves), so that the activations decide. Writes the recipes to OUT and
runs `dmquant compare` on them; the table is in OUT/compare/report.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from dmquant.recipe import Recipe

SCALES = {
    "online-token": ("online", "token"),
    "online-tensor": ("online", "tensor"),
    "static-tensor": ("static:1", "tensor"),
    "static-10-tensor": ("static:10", "tensor"),
    "static-channel": ("static:1", "channel"),
    "static-10-channel": ("static:10", "channel"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-pixart")
    parser.add_argument("--activations", default="fp6")
    parser.add_argument("--prompts", default="emoji-held-out", help="what images are made of; default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/static-activations"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (scale, granularity) in SCALES.items():
        recipe = Recipe.load("rtn64", w="int8", a=options.activations).with_settings(
            name=name, activation_scale=scale, activation_granularity=granularity
        )
        files.append(options.out / f"{name}.yaml")
        recipe.save(files[-1])
    command = [sys.executable, "-m", "dmquant", "compare", options.model, "--recipes", ",".join(map(str, files))]
    command += ["--prompts", options.prompts, "--num-prompts", str(options.num_prompts)]
    command += ["--metrics", "psnr,ssim,latent_mse"]
    subprocess.run([*command, "--out", str(options.out / "compare")], check=True)


if __name__ == "__main__":
    main()
