"""How near the pipelines in some folders come to full precision, on held-out prompts: a markdown table.

    python benchmarks/folders.py [--model emoji-pixart] [--images 32] FOLDER ...

Folders are those of `dmquant quantize`, `dmquant tune` or the `model` of a run, all of one embedded model. Final
latents and PSNR are measured as in benchmarks/calibration.py.
"""

import argparse
from pathlib import Path

from calibration import PROMPTS, Bench, psnr_of

from dmquant.pipelines.models.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--model", default="emoji-pixart", help="what they were made of; default %(default)s")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--prompts", default=PROMPTS, help="default %(default)s")
    options = parser.parse_args()
    bench = Bench(Path("runs/folders"), options.images, options.model, options.prompts)
    full = bench.final_latents(bench.full)
    images = bench.decode(full)
    print("| model | final latents | PSNR, dB |\n| --- | --- | --- |")
    for folder in options.folders:
        latents = bench.final_latents(getattr(load_pipeline(folder), bench.settings.family.component))
        psnr = psnr_of(bench.decode(latents), images).mean()
        print(f"| {folder.name} | {(latents - full).square().mean():.5f} | {psnr:.2f} |", flush=True)


if __name__ == "__main__":
    main()
