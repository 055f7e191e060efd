"""Animated PNG: all frames of a video without loss, in one file that browsers play (PNG 3rd edition, section 11.3.5).

Written here, since Pillow makes one frame of neighbours that are equal, and frames of two videos are compared by their
numbers.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image, PngImagePlugin

from dmquant.evaluation.png import FRAME, SIGNATURE

FRAMES_A_SECOND = 16  # as Wan makes them
DATA = b"IDAT"


def encoded(frames: Sequence[Image.Image], about: PngImagePlugin.PngInfo) -> bytes:
    """The bytes of an animated PNG of `frames`, all of one size and mode, that plays for ever, with the texts `about`.

    Each frame replaces the one before as a whole.
    """
    first, *others = (
        list(_chunks(_still(frame, about if number == 0 else None))) for number, frame in enumerate(frames)
    )
    header = next(content for kind, content in first if kind == b"IHDR")
    size, out, place = header[:8], [SIGNATURE], 0

    def put(kind: bytes, content: bytes) -> None:
        out.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))

    def begin_frame(number: int) -> None:
        """A frame of the whole size at the origin, shown for its time; nothing is disposed of or blended."""
        put(b"fcTL", struct.pack(">I", number) + size + struct.pack(">IIHHBB", 0, 0, 1, FRAMES_A_SECOND, 0, 0))

    begun = False
    for kind, content in first[:-1]:
        if kind == DATA and not begun:
            begin_frame(place)
            begun, place = True, place + 1
        put(kind, content)
        if kind == b"IHDR":
            put(b"acTL", struct.pack(">II", len(frames), 0))
    for chunks in others:
        begin_frame(place)
        place += 1
        for content in (content for kind, content in chunks if kind == DATA):
            put(b"fdAT", struct.pack(">I", place) + content)
            place += 1
    put(b"IEND", b"")
    return b"".join(out)


def _still(frame: Image.Image, about: PngImagePlugin.PngInfo | None) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, format="PNG", pnginfo=about)
    return buffer.getvalue()


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of the chunks of a PNG file."""
    place = len(SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += FRAME + length
