"""One picture that shows what quantization did: the same prompts, side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmquant.errors import UserError
from dmquant.evaluation.images import matching_images, open_rgb, save_image

SMALLEST, LARGEST = 128, 384  # pixels: the longer side of a picture in the grid
LINE_WIDTH = 1320  # pixels: rows of small pictures share a line up to this width
GAP, MARGIN = 8, 24  # pixels, between the pictures of a row and around rows
FONT_SIZE, LINE_HEIGHT, CAPTION_LINES = 15, 19, 2
ELLIPSIS = "..."  # Pillow's built-in font has no single character for it
INK, FAINT, PAPER = "#1b1b1f", "#5f6068", "#ffffff"


def draw_grid(
    columns: Mapping[str, Path],
    prompts: Sequence[str],
    out: Path,
    rows: int = 12,
    amplify: float | None = 4.0,
) -> Path:
    """Draw the images of several folders side by side, a row a prompt, and write the PNG to `out`.

    `columns` maps a heading to a folder of PNG images of the same names, full precision first. `prompts` has one
    entry per image, in the order of the names. At most `rows` prompts are shown, evenly spread over all of them.
    Where there are two columns, their absolute difference times `amplify` is the third, unless that is None. Raises
    UserError for missing or unreadable images and for prompts that do not match them.
    """
    folders = matching_images({heading: Path(folder) for heading, folder in columns.items()}, len(prompts))
    chosen = _spread(len(prompts), rows)
    headings = list(columns)
    if len(headings) != 2:
        amplify = None
    if amplify is not None:
        headings.append(f"{amplify:g}x difference")
    largest = max(SMALLEST, min(LARGEST, (LINE_WIDTH - 2 * MARGIN + GAP) // len(headings) - GAP))
    pictures = [_row([paths[index] for paths in folders.values()], amplify, largest) for index in chosen]
    sheet = _compose(pictures, [prompts[index] for index in chosen], headings)
    save_image(sheet, Path(out))
    return Path(out)


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly spaced, first and last included."""
    if count <= limit:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _row(paths: list[Path], amplify: float | None, largest: int) -> list[Image.Image]:
    first, *others = pictures = [open_rgb(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if other.size != first.size:
            raise UserError(f"{path} and {paths[0]} differ in size: generate both at one size")
    if amplify is not None:
        pictures.append(_difference(first, others[0], amplify))
    return [_scaled(picture, largest) for picture in pictures]


def _difference(a: Image.Image, b: Image.Image, amplify: float) -> Image.Image:
    distance = np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32))
    return Image.fromarray((distance * amplify).clip(0, 255).round().astype(np.uint8))


def _scaled(picture: Image.Image, largest: int) -> Image.Image:
    """`picture` enlarged by a whole factor if it is small, reduced if its longer side is over `largest` pixels."""
    side = max(picture.size)
    if side < SMALLEST:
        factor = -(-SMALLEST // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
    if side > largest:
        width, height = (max(1, round(length * largest / side)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture


def _compose(rows: list[list[Image.Image]], captions: list[str], headings: list[str]) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
    row_width = len(headings) * (width + GAP) - GAP
    wrapped = [_wrapped(caption, row_width, font) for caption in captions]
    row_height = height + GAP + max(map(len, wrapped)) * LINE_HEIGHT
    per_line = max(1, min(len(rows), (LINE_WIDTH - MARGIN) // (row_width + MARGIN)))
    lines = -(-len(rows) // per_line)
    titles = [_wrapped(heading, width, font) for heading in headings]
    top = MARGIN + max(map(len, titles)) * LINE_HEIGHT + GAP
    sheet = Image.new(
        "RGB",
        (per_line * (row_width + MARGIN) + MARGIN, top + lines * (row_height + MARGIN)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for across in range(per_line):
        for column, lines_of_title in enumerate(titles):
            left = MARGIN + across * (row_width + MARGIN) + column * (width + GAP)
            for index, line in enumerate(lines_of_title):
                draw.text((left, MARGIN + index * LINE_HEIGHT), line, fill=INK, font=font)
    for number, (row, lines_of_text) in enumerate(zip(rows, wrapped, strict=True)):
        left = MARGIN + (number % per_line) * (row_width + MARGIN)
        y = top + (number // per_line) * (row_height + MARGIN)
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + column * (width + GAP), y))
        for index, line in enumerate(lines_of_text):
            draw.text((left, y + height + GAP // 2 + index * LINE_HEIGHT), line, fill=FAINT, font=font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` broken into at most CAPTION_LINES lines of `width` pixels, the last one shortened if there is more."""
    average = font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    lines = textwrap.wrap(" ".join(text.split()), width=max(8, int(width / average)))
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], " ".join(lines[CAPTION_LINES - 1 :])]
    return [_fitted(line, width, font) for line in lines]


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """`text`, shortened so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + ELLIPSIS) > width:
        text = text[:-1]
    return text.rstrip() + ELLIPSIS
