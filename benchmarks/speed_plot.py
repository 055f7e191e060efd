"""Draw what `benchmarks/layers.py --out layers.json` measured: docs/images/speed.png.

    python benchmarks/speed_plot.py layers.json docs/images/speed.png

One panel a layer, one bar a way: its time over that of torch's faster dtype, median, with a line from the lower to the
upper quartile. What is over LONGEST is cut off and says how long it is.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from turns import quartiles
from ways import BFLOAT16, FLOAT32, WAYS

PANELS = ("PixArt ff.net.0 1152→4608, 1,024", "SDXL GEGLU", "conv 640")
LONGEST = 3.0
COLOURS = {"dmquant": "#1f6f8b", "torch": "#8a8a8a"}
OTHERS = "#d9a441"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    base = FLOAT32 if measured["base"] == "float32" else BFLOAT16
    titles = [line["layer"] for line in measured["results"]["torch"]]
    panels = [title for start in PANELS for title in titles if title.startswith(start)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 5.2), sharey=True, squeeze=False)
    names = [way.name for way in WAYS if isinstance(measured["results"].get(way.process), list)]
    for panel, title in zip(axes[0], panels, strict=True):
        for at, way in enumerate(way for way in WAYS if way.name in names):
            seconds = next((one["seconds"] for one in measured["results"][way.process] if one["layer"] == title), {})
            if way.name not in seconds:
                panel.text(0.03, at, "not measured", va="center", fontsize=7, color="#777777")
                continue
            low, middle, high = quartiles(a / b for a, b in zip(seconds[way.name], seconds[base], strict=True))
            panel.barh(at, min(middle, LONGEST), color=COLOURS.get(way.process, OTHERS), height=0.7)
            if middle <= LONGEST:
                panel.plot([low, min(high, LONGEST)], [at, at], color="black", linewidth=1.2)
            panel.text(min(max(middle, high), LONGEST) + 0.05, at, f"{middle:.2f}", va="center", fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set_title(title, fontsize=9)
        panel.set_xlim(0, LONGEST + 0.4)
        panel.set_xlabel(f"time / {base}", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
