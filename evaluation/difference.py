"""The difference of two pictures of one prompt, as one number and as a picture; of videos, of the frames shown."""

from pathlib import Path

import numpy as np
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.images import open_strip


def open_alike(paths: list[Path]) -> list[Image.Image]:
    """The images at `paths` as RGB, or strips of videos; UserError for one that is unreadable or of another size."""
    first, *others = pictures = [open_strip(path)[0] for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if other.size != first.size:
            raise UserError(f"{path} and {paths[0]} differ in size: generate both at one size")
    return pictures


def rms_difference(a: Image.Image, b: Image.Image) -> float:
    """Root mean square difference over pixels and channels, in 8-bit steps: PSNR is 20 log10(255 / this)."""
    return float(np.sqrt(np.square(_apart(a, b)).mean(dtype=np.float64)))


def difference_picture(a: Image.Image, b: Image.Image, amplify: float) -> Image.Image:
    """The absolute difference times `amplify`, black where the two are equal."""
    return Image.fromarray((np.abs(_apart(a, b)) * amplify).clip(0, 255).round().astype(np.uint8))


def _apart(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)
