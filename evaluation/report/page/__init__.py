"""report.html: one file with the numbers, the charts and the images in it, for any browser and without a network."""

from importlib.resources import files
from pathlib import Path
from string import Template

from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.report import wording
from dmquant.evaluation.report.page import sections
from dmquant.evaluation.report.page.gallery import image_pairs
from dmquant.evaluation.report.page.markup import escape
from dmquant.evaluation.report.page.pictures import data_uri
from dmquant.evaluation.result import Report


def render_html(folder: Path, report: Report, progress: Progress = silent) -> str:
    """The report as an HTML page that is whole by itself; `folder` is where it will lie, with the images.

    Raises UserError when an image folder is missing or does not hold one readable image per prompt.
    """
    pairs = image_pairs(folder, report, progress)
    parts = [
        ("metrics", "Metrics", sections.metrics(report)),
        ("pairs", "Image pairs", sections.pairs(report, pairs)),
        ("layers", "Error of each layer", sections.layers(report)),
        ("steps", "Error along the steps", sections.steps(report)),
        ("size", "Size and speed", sections.size(report)),
        ("repeat", "Repeat it", sections.repeat(report)),
    ]
    shown = [part for part in parts if part[2]]
    return Template(_read("page.html")).substitute(
        title=escape(wording.title(report)),
        summary=escape(wording.summary(report)),
        style=_read("page.css"),
        script=_read("page.js"),
        tiles=sections.tiles(report),
        plot=_plot(folder / "compare.png"),
        navigation="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown),
        sections="\n".join(
            f'<section id="{name}">\n<h2>{title}</h2>\n{html}\n</section>' for name, title, html in shown
        ),
        data=pairs.data,
    )


def _plot(path: Path) -> str:
    """The plot of a comparison, or nothing where there is none."""
    if not path.is_file():
        return ""
    source = data_uri(path.read_bytes(), "png")
    return f'<img class="plot" alt="Quality of every recipe against its bits a weight" src="{source}">'


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
