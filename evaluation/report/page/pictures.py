"""The images inside the page: the files as they are where they fit, else all of them re-encoded alike."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.images import number_of_frames, open_strip
from dmquant.evaluation.progress import Progress, silent

BUDGET = 26_000_000  # characters of base64, so that the whole page stays under 30 MB
SIDES = (768, 512, 384, 256, 192, 128, 96, 64)  # pixels, the longer side
QUALITIES = (95, 90, 84, 76, 65)
SAMPLE = 12  # images that a re-encoding is tried on
HEADROOM = 0.92  # the others may take a little more than those


@dataclass(frozen=True)
class WebP:
    """WebP of one quality, with the longer side of an image, or of each frame in a strip, at most `side` pixels."""

    side: int
    quality: int

    def encode(self, path: Path) -> str:
        """The image at `path`, or a strip of the video there, as a data: URI."""
        picture, frames = open_strip(path)
        picture.thumbnail((self.side * frames, self.side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=self.quality, method=3)
        return data_uri(buffer.getvalue(), "webp")

    def __str__(self) -> str:
        return f"WebP of quality {self.quality}, at most {self.side} pixels a side"


def embed(paths: Sequence[Path], budget: int = BUDGET, progress: Progress = silent) -> tuple[list[str], WebP | None]:
    """The images at `paths` as data: URIs of at most `budget` characters in all, and how they were re-encoded, if so.

    One re-encoding serves all, so that the two images of a pair stay comparable: the first of SIDES and QUALITIES that
    fits. Of videos there are strips, which are always encoded. Raises UserError for an unreadable image and where not
    even the smallest fits.
    """
    if number_of_frames(paths[0]) == 1 and sum(4 * path.stat().st_size / 3 + 32 for path in paths) <= budget:
        return [data_uri(path.read_bytes(), "png") for path in paths], None
    sample = paths[:: max(1, len(paths) // SAMPLE)]
    with ThreadPoolExecutor() as threads:
        for encoding in (WebP(side, quality) for side in SIDES for quality in QUALITIES):
            tried = sum(map(len, threads.map(encoding.encode, sample)))
            if tried / len(sample) * len(paths) > HEADROOM * budget:
                continue
            uris = []
            for uri in threads.map(encoding.encode, paths):
                uris.append(uri)
                progress("pictures for the page", len(uris), len(paths))
            if sum(map(len, uris)) <= budget:
                return uris, encoding
    raise UserError(f"{len(paths)} images are too many for one page")


def data_uri(data: bytes, kind: str) -> str:
    """An image file's bytes as the source of an <img>."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
