"""What quantizing the convolutions buys: a UNet at FP4 throughout against one whose convolutions stay at INT8.

    python benchmarks/convolutions.py --model emoji-sd --out runs/convolutions

Leaving convolutions at 8 bit is what most tools do. That model, with everything else at FP4, is also compared at equal
average bits: the same bits spread over all layers. All three are calibrated as the recipe `adaround` says. Writes
the recipes to OUT and runs `dmquant compare` on them; the table here says the bits of the quantized layers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dmquant.recipe import Recipe, Rule

CONVOLUTIONS = ["*.resnets.*.conv*", "*.downsamplers.*", "*.upsamplers.*", "*.proj_in", "*.proj_out"]


def recipe_of(name: str, linear: str, convolutions: str) -> Recipe:
    """`adaround` with one format for convolutions, whose inputs are INT8, and one for everything else."""
    base = Recipe.load("adaround", w=linear)
    candidates = None if base.candidates is None else [convolutions]
    rule = Rule(match=CONVOLUTIONS, weights=convolutions, activations="int8", candidates=candidates)
    return base.with_settings(name=name, rules=[rule, *base.rules])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--prompts", default="emoji-held-out", help="what images are made of; default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/convolutions"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipes = [recipe_of("convs-int8", "fp4", "int8"), recipe_of("convs-fp7", "fp6", "fp7_e2m4")]
    files = [options.out / f"{recipe.name}.yaml" for recipe in recipes]
    for recipe, file in zip(recipes, files, strict=True):
        recipe.save(file)
    entries = ",".join(["adaround", *map(str, files)])
    command = [sys.executable, "-m", "dmquant", "compare", options.model, "--recipes", entries]
    command += ["--prompts", options.prompts, "--num-prompts", str(options.num_prompts)]
    command += ["--metrics", "psnr,ssim,latent_mse"]
    subprocess.run([*command, "--out", str(options.out / "compare")], check=True)

    report = json.loads((options.out / "compare/report.json").read_text())["recipes"]
    print("\n| recipe | formats | quantized | PSNR, dB | latent MSE |\n| --- | --- | --- | --- | --- |")
    for name, facts in report.items():
        psnr, latents = (facts["metrics"][metric]["value"] for metric in ("psnr", "latent_mse"))
        settings = facts["settings"]
        print(f"| {name} | {settings['formats']} | {settings['quantized']} | {psnr:.2f} | {latents:.4f} |")


if __name__ == "__main__":
    main()
