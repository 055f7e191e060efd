"""report.html: one file with the numbers and the grid in it; the image pairs are linked and load when scrolled to."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from PIL import Image

from dmquant.evaluation import report_tables as tables
from dmquant.evaluation.images import matching_images
from dmquant.evaluation.result import Metric, Report

SMALLEST, LARGEST = 128, 320  # pixels: the width an image of a pair is shown at

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --faint: #5f6068; --line: #dcdce2; --paper: #fff; --panel: #f5f5f8;
  --accent: #2457c5; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ee; --faint: #a2a3ae; --line: #383942; --paper: #141519;
  --panel: #1d1e24; --accent: #8ab0ff; --warn: #e2b45c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1290px; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: 0 0 .8rem; color: var(--faint); max-width: 75ch; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--panel); font-weight: 600; font-size: .85rem; color: var(--faint); }
tbody th { font-weight: 600; white-space: nowrap; }
td.fact { white-space: nowrap; }
td small { display: block; min-width: 11rem; color: var(--faint); font-size: .8rem; }
.missing { color: var(--warn); font-size: .85rem; min-width: 12rem; }
.picture { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
.pairs { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; padding: .7rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  max-width: 100%; }
figure > div { display: grid; grid-template-columns: repeat($columns, minmax(0, $width)); gap: .5rem; }
figure a { color: var(--faint); text-decoration: none; font-size: .78rem; overflow-wrap: anywhere; }
figure a:hover { color: var(--accent); }
figure img { display: block; width: 100%; aspect-ratio: $aspect; border-radius: 4px; background: var(--line); }
figcaption { margin-top: .5rem; font-size: .85rem; width: 0; min-width: 100%; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 1.2rem; align-items: start; }
code { font-size: .85em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
$plot
<h2>Size and cost</h2>
$facts
<h2>Metrics</h2>
$metrics
<h2>Images</h2>
$grid
<h2>All $count prompts</h2>
<p>The images of a prompt share its seed and initial noise. Select one to open the file.</p>
<div class="pairs">
$pairs
</div>
<h2>$recipes_title</h2>
$recipes
<h2>Settings and versions</h2>
<div class="two">
$settings
$versions
</div>
</body>
</html>
""")


def render_html(folder: Path, report: Report) -> str:
    """The report as an HTML page; `folder` is where it will lie, with grid.png and the images.

    Raises UserError when an image folder is missing or does not hold one image per prompt.
    """
    count = len(report.prompts)
    images = matching_images({name: folder / kind.images for name, kind in tables.variants(report).items()}, count)
    width, height = _shown_size(next(iter(images.values())))
    return PAGE.substitute(
        title=escape(tables.title(report)),
        summary=escape(_summary(report)),
        facts=_table(tables.FACTS_HEADER, map(_fact_row, tables.facts(report))),
        metrics=_metrics(report),
        plot=_picture(folder / "compare.png", "PSNR of every recipe against its bits a weight and its latent MSE"),
        grid=_picture(folder / "grid.png", "Full-precision and quantized images side by side"),
        recipes_title="Recipes" if len(report.recipes) > 1 else "Recipe",
        recipes=_table(("", *report.recipes), map(_setting_row, tables.recipe_settings(report))),
        count=count,
        columns=len(images),
        width=f"{width}px",
        aspect=f"{width} / {height}",
        pairs="\n".join(_pair(folder, index, prompt, images) for index, prompt in enumerate(report.prompts)),
        settings=_table(("setting", "value"), map(_plain_row, report.settings.items())),
        versions=_table(("package", "version"), map(_plain_row, report.versions.items())),
    )


def _summary(report: Report) -> str:
    reference = report.reference
    recipes = [
        f"{name} stores {recipe.bits_per_weight:.2f} bits a weight and makes the backbone "
        f"{reference.size_bytes / recipe.size_bytes:.1f} times smaller than 16 bit"
        for name, recipe in report.recipes.items()
    ]
    return "; ".join(recipes) + "." if len(recipes) <= 2 else f"Full precision is {reference.dtype}."


def _metrics(report: Report) -> str:
    """A row a variant, a column a metric; what a cell says besides its value stands below it."""
    names = tables.shown_metrics(report)
    if not names:
        return "<p>None were asked for.</p>"
    rows = (
        [f"<th scope=row>{escape(title)}</th>", *(_metric_cell(name, variant.metrics.get(name)) for name in names)]
        for title, variant in tables.scored(report).items()
    )
    return _table(("", *map(tables.metric_title, names)), rows)


def _metric_cell(name: str, metric: Metric | None) -> str:
    if metric is None:
        return "<td></td>"
    if metric.value is None:
        return f'<td class="missing">{escape(tables.metric_value(name, metric))}</td>'
    interval = tables.metric_interval(name, metric)
    details = [
        f"95 %: {interval}" if interval else "",
        metric.note or f"{metric.images} images",
        tables.backbone_text(metric.backbone),
    ]
    below = "".join(f"<small>{escape(detail)}</small>" for detail in details if detail)
    return f"<td>{escape(tables.metric_value(name, metric))}{below}</td>"


def _picture(path: Path, about: str) -> str:
    """An image inside the page, or nothing where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="picture" alt="{escape(about)}" src="data:image/png;base64,{data}">'


def _pair(folder: Path, index: int, prompt: str, images: dict[str, list[Path]]) -> str:
    links = "".join(
        f'<a href="{source}"><img loading="lazy" alt="" src="{source}">{escape(name)}</a>'
        for name, paths in images.items()
        for source in [escape(quote(paths[index].relative_to(folder).as_posix()))]
    )
    return f"<figure><div>{links}</div><figcaption>{escape(prompt)}</figcaption></figure>"


def _shown_size(paths: list[Path]) -> tuple[int, int]:
    with Image.open(paths[0]) as image:
        width = min(max(image.width, SMALLEST), LARGEST)
        return width, round(image.height * width / image.width)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of rows whose cells are HTML already, or "" without rows."""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _fact_row(row: Sequence[str]) -> list[str]:
    name, *values = row
    return [f"<th scope=row>{escape(name)}</th>", *(f'<td class="fact">{escape(value)}</td>' for value in values)]


def _setting_row(row: Sequence[str]) -> list[str]:
    name, *values = row
    return [f"<th scope=row>{escape(name)}</th>", *(f"<td><code>{escape(value)}</code></td>" for value in values)]


def _plain_row(item: tuple[str, object]) -> list[str]:
    key, value = item
    return _setting_row((key, str(value)))
