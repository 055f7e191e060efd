"""Read a PNG file without its pixels: whether it is whole, and the key and prompt that dmquant wrote into it.

A chunk's checksum covers all its bytes, so a damaged or truncated file is found without its pixels being decoded.
"""

import zlib
from pathlib import Path

from PIL import Image

from dmquant.errors import UserError
from dmquant.host.files import remembering
from dmquant.host.text import unescaped

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEY = "key"
SOFTWARE, OURS = "Software", "dmquant"  # of pictures: grids and plots
FRAME = 12  # bytes of a chunk beside its data: length, type, checksum


def read_key(path: Path) -> str | None:
    """The key of a whole PNG of ours; None for anything else. A file that has not changed is not read again."""
    try:
        return _key(path)
    except UserError:
        return None


def read_prompt(path: Path) -> str | None:
    """The prompt that a PNG of ours was made from, or None."""
    try:
        with Image.open(path) as image:
            text = image.info.get("prompt")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # whoever opens it for its pixels says what is wrong
    return unescaped(text) if isinstance(text, str) else None


def is_picture(path: Path) -> bool:
    """Whether a file is a whole PNG that dmquant drew, such as a grid."""
    try:
        return _text_of_whole(path.read_bytes(), SOFTWARE) == OURS
    except OSError:
        return False


@remembering
def _key(path: Path) -> str | None:
    return _text_of_whole(path.read_bytes(), KEY)


def _text_of_whole(data: bytes, keyword: str) -> str | None:
    """The tEXt of a keyword in a PNG file; None where it is not whole or has none (PNG 3rd edition, section 5)."""
    if not data.startswith(SIGNATURE):
        return None
    text, place, view = None, len(SIGNATURE), memoryview(data)
    while place + FRAME <= len(data):
        length = int.from_bytes(view[place : place + 4], "big")
        body, end = view[place + 4 : place + 8 + length], place + FRAME + length
        if end > len(data) or zlib.crc32(body) != int.from_bytes(view[end - 4 : end], "big"):
            return None
        kind, content = bytes(body[:4]), body[4:]
        if kind == b"tEXt":
            name, _, value = bytes(content).partition(b"\0")
            text = value.decode("latin-1") if name.decode("latin-1") == keyword else text
        if kind == b"IEND":
            return text
        place = end
    return None
