"""How big report.html of many image pairs is, and how fast Chromium opens it: one line of JSON.

    python benchmarks/report_page.py --pairs 200 --side 512

The images are made up: smooth noise of several scales with fine grain, about as hard to compress as photographs. Needs
Chromium, its chromedriver and the package selenium.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from dmquant.evaluation.report.files import write_report
from dmquant.evaluation.result import LayerError, RecipeResult, Reference, Report, StepError

TIMES = """
const [page] = performance.getEntriesByType("navigation");
const paint = performance.getEntriesByName("first-contentful-paint")[0];
return {dom_ready_s: page.domContentLoadedEventEnd / 1000, loaded_s: page.loadEventEnd / 1000,
        first_paint_s: paint ? paint.startTime / 1000 : null};
"""


def picture(side: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32) / cells**0.7
    total = (total - total.min()) / (total.max() - total.min()) * 255
    return total + rng.normal(0, 2, total.shape)


def write_pairs(folder: Path, pairs: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for kind in ("fp", "quantized"):
        (folder / "images" / kind).mkdir(parents=True)
    for index in range(pairs):
        reference = picture(side, index)
        for kind, sigma in (("fp", 0.0), ("quantized", rng.uniform(1, 8))):
            pixels = (reference + rng.normal(0, sigma, reference.shape)).round().clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / kind / f"{index:05d}.png")


def made_up_report(pairs: int, layers: int = 300, steps: int = 20) -> Report:
    recipe = RecipeResult(
        weights="fp4_e2m1",
        activations="fp6_e2m3",
        bits_per_weight=4.31,
        size_bytes=4_000_000,
        layers=[LayerError(f"block.{i}", "Linear", "fp4_e2m1", 4.25, 1e-3, 1e-2) for i in range(layers)],
        steps=[StepError(i, 1000 - 50 * i, 1e-4 * (i + 1), 1.0) for i in range(steps)],
    )
    return Report(
        model="made-up",
        reference=Reference(dtype="bf16", size_bytes=16_000_000),
        recipes={"w4a6": recipe},
        prompts=[f"picture number {index} with a prompt of usual length" for index in range(pairs)],
    )


def open_page(path: Path) -> dict[str, float]:
    """Seconds from the navigation's start, as Chromium itself says."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get("about:blank")  # the browser's own start is not the page's
        browser.get(path.resolve().as_uri())
        time.sleep(1)
        return browser.execute_script(TIMES)
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pairs(folder, given.pairs, given.side)
        start = time.perf_counter()
        write_report(folder, made_up_report(given.pairs))
        written = time.perf_counter() - start
        page = folder / "report.html"
        opened = [open_page(page) for _ in range(given.repeats)]
        files = sum(path.stat().st_size for path in folder.glob("images/*/*.png"))
        median = {name: round(float(np.median([times[name] for times in opened])), 3) for name in opened[0]}
        size = round(page.stat().st_size / 1e6, 2)
    print(
        json.dumps(
            {
                "pairs": given.pairs,
                "side": given.side,
                "png_files_mb": round(files / 1e6, 1),
                "page_mb": size,
                "write_s": round(written, 1),
                **median,
            }
        )
    )


if __name__ == "__main__":
    main()
