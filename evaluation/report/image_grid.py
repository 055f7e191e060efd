"""A picture that shows the effect of quantization: images of the same prompts, side by side, or strips of videos."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmquant.evaluation.difference import difference_picture, open_alike, rms_difference
from dmquant.evaluation.images import STRIP, matching_images, number_of_frames, open_rgb, save_image
from dmquant.host.text import visible

SMALLEST, LARGEST = 128, 384  # pixels: the longer side of a picture in the grid
LINE_WIDTH = 1320  # pixels: small pictures of several prompts share a line up to this width
MOST_PIXELS = 16_000_000  # of the whole picture: pictures get smaller, then prompts fewer
GAP, MARGIN = 8, 24  # pixels, between the pictures of a prompt and around prompts
FONT_SIZE, LINE_HEIGHT = 14, 18
CAPTION_LINES, HEADING_LINES = 8, 4  # longer text is cut: a prompt has some 75 words at most
ELLIPSIS = "…"
INK, FAINT, PAPER = "#1b1b1f", "#5f6068", "#ffffff"


@dataclass(frozen=True)
class Prompt:
    """A prompt's part of the grid: its rows of pictures (None is an empty place), and its caption."""

    rows: list[list[Image.Image | None]]
    caption: str


def draw_grid(
    columns: Mapping[str, Path],
    prompts: Sequence[str],
    out: Path,
    rows: int = 12,
    amplify: float | None = 4.0,
    worst: bool = False,
    per_line: int | None = None,
    inputs: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Draw the images of several folders side by side, a row a prompt, and write the PNG to `out`.

    `columns` maps a heading to a folder of images of the same names, full precision first. `prompts` has one
    entry per image, in the order of the names. At most `rows` prompts are shown: evenly spread over all of them, or
    with `worst` those whose images are furthest from full precision, the furthest first. Their absolute difference to
    full precision times `amplify` stands beside one recipe, below several; None leaves it out. `per_line` prompts
    share a line, by default as many as fit. `inputs` are folders of what went into the pipeline, which come first.
    Raises UserError for missing or unreadable images and for prompts that do not match them.
    """
    folders = matching_images({heading: Path(folder) for heading, folder in columns.items()}, len(prompts))
    before = matching_images(inputs, len(prompts)) if inputs else {}
    headings = list(columns)
    if len(headings) == 2 and amplify is not None:
        headings.append(_difference_heading(amplify))
    headings = [*before, *headings]
    beside = list(zip(*folders.values(), strict=True))  # all images of a prompt
    given = list(zip(*before.values(), strict=True)) if before else [()] * len(prompts)
    frames = min(STRIP, number_of_frames(beside[0][0]))
    if frames > 1:  # strips of videos, one below the other
        below = len(columns) + (len(columns) - 1 if amplify is not None else 0)
        headings = [", below it ".join(headings)]
        side, limit = _fit(rows, frames, below)
    else:
        side, limit = _fit(rows, len(headings), 2 if amplify is not None and len(columns) > 2 else 1)
    captions = list(prompts)
    if worst:
        apart = [_furthest(paths) for paths in beside]
        chosen = sorted(range(len(prompts)), key=apart.__getitem__, reverse=True)[:limit]
        captions = [
            f"{paths[0].stem}, difference {difference:.1f} of 255: {prompt}"
            for paths, difference, prompt in zip(beside, apart, prompts, strict=True)
        ]
    else:
        chosen = _spread(len(prompts), limit)
    shown = [Prompt(_pictures(given[index], beside[index], amplify, side, frames), captions[index]) for index in chosen]
    save_image(_compose(shown, headings, amplify, per_line), Path(out))
    return Path(out)


def _fit(rows: int, across: int, down: int) -> tuple[int, int]:
    """The longer side of a picture, and how many prompts, so that the grid is not larger than MOST_PIXELS."""
    side = max(SMALLEST, min(LARGEST, (LINE_WIDTH - 2 * MARGIN + GAP) // across - GAP))

    def pixels(side: int) -> int:
        caption = 3 * LINE_HEIGHT + MARGIN
        return across * (side + GAP) * (down * (side + GAP) + caption)

    while side > SMALLEST and rows * pixels(side) > MOST_PIXELS:
        side -= 8
    return side, max(1, min(rows, MOST_PIXELS // pixels(side)))


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly spaced, first and last included."""
    if count <= limit:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _furthest(paths: Sequence[Path]) -> float:
    """The largest difference of an image from the first one."""
    reference, *others = open_alike(list(paths))
    return max((rms_difference(reference, other) for other in others), default=0.0)


def _pictures(
    given: Sequence[Path], paths: Sequence[Path], amplify: float | None, side: int, frames: int
) -> list[list[Image.Image | None]]:
    """Rows of pictures: what was given and what was made of it, and differences beside or below."""
    inputs = [open_rgb(path) for path in given]
    reference, *others = pictures = open_alike(list(paths))
    rows: list[list[Image.Image | None]] = [pictures]
    if amplify is not None and others:
        apart = [difference_picture(reference, other, amplify) for other in others]
        rows = [pictures + apart] if len(others) == 1 else [pictures, [None, *apart]]
    nothing = [Image.new("RGB", image.size, PAPER) for image in inputs]  # below them
    rows = [[*(inputs if row[0] is reference else nothing), *row] for row in rows]
    if frames > 1:
        rows = [[picture] for row in rows for picture in row if picture is not None]
    return [[None if picture is None else _scaled(picture, side, frames) for picture in row] for row in rows]


def _scaled(picture: Image.Image, largest: int, frames: int = 1) -> Image.Image:
    """`picture`, of so many frames in a row, enlarged by a whole factor if they are small, reduced if their longer side
    is over `largest` pixels."""
    side = max(picture.width // frames, picture.height)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
    if side > largest:
        width, height = (max(1, round(length * largest / side)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture


def _compose(prompts: list[Prompt], headings: list[str], amplify: float | None, per_line: int | None) -> Image.Image:
    pictures = [picture for prompt in prompts for row in prompt.rows for picture in row if picture is not None]
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    row_width = len(headings) * (width + GAP) - GAP
    fitting = max(1, (LINE_WIDTH - MARGIN) // (row_width + MARGIN))
    across = min(len(prompts), per_line or fitting)
    captions = [_wrapped(prompt.caption, row_width, CAPTION_LINES) for prompt in prompts]
    titles = [_wrapped(heading, width, HEADING_LINES) for heading in headings]
    tops = [MARGIN + max(map(len, titles)) * LINE_HEIGHT + GAP]  # of each line of prompts, and of the part below
    for start in range(0, len(prompts), across):
        text = max(map(len, captions[start : start + across])) * LINE_HEIGHT
        tops.append(tops[-1] + len(prompts[start].rows) * (height + GAP) + text + MARGIN)
    sheet = Image.new("RGB", (across * (row_width + MARGIN) + MARGIN, tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + place * (row_width + MARGIN) for place in range(across)]
    for left in lefts:
        for column, title in enumerate(titles):
            _write(draw, left + column * (width + GAP), MARGIN, title, INK)
    for number, (prompt, caption) in enumerate(zip(prompts, captions, strict=True)):
        left, y = lefts[number % across], tops[number // across]
        for row in prompt.rows:
            for column, picture in enumerate(row):
                x = left + column * (width + GAP)
                if picture is None:
                    _write(draw, x, y, _wrapped(_difference_heading(amplify), width, HEADING_LINES), FAINT)
                else:
                    sheet.paste(picture, (x, y))
            y += height + GAP
        _write(draw, left, y - GAP // 2, caption, FAINT)
    return sheet


def _difference_heading(amplify: float) -> str:
    return f"{amplify:g}× difference"


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], colour: str) -> None:
    for index, line in enumerate(lines):
        draw.text((x, y + index * LINE_HEIGHT), line, fill=colour, font=_font())


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it: it has the letters and signs that Pillow's own font lacks."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """`text` broken into lines of at most `width` pixels; of more than `most` lines the rest is cut and said to be."""
    lines: list[str] = []
    for word in visible(text).split():
        if lines and _length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while _length(word) > width:
            fits = max(1, _fitting(word, width))
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    return [*lines[: most - 1], last[: _fitting(last, width - _length(ELLIPSIS))].rstrip() + ELLIPSIS]


def _fitting(text: str, width: float) -> int:
    """Number of characters of `text` that fit into `width` pixels; a name is broken after a hyphen or underscore."""
    fits = max(0, bisect_right(range(len(text) + 1), max(width, 0), key=lambda count: _length(text[:count])) - 1)
    if fits == len(text):
        return fits
    natural = max(text.rfind(sign, 0, fits) for sign in "-_") + 1
    return natural if natural > fits // 3 else fits


def _length(text: str) -> float:
    return _font().getlength(text)
