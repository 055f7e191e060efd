"""Images that go into a pipeline beside the prompts: fitted to a size, opened when needed, saved as they went in."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from dmquant.evaluation.images import open_rgb
from dmquant.evaluation.png import KEY, read_key
from dmquant.host.files import replacing

RGB, MASK = "RGB", "L"
"""Modes of Pillow: colours, and one channel, which of a mask is white where the pipeline may change the image."""


@dataclass(frozen=True)
class FilePicture:
    """The image in a file as a pipeline takes it: in the mode `mode`, `size` wide and high."""

    path: Path
    size: tuple[int, int]
    mode: str = RGB
    sha256: str = field(init=False)
    """Of the pixels, with size and mode."""

    def __post_init__(self) -> None:
        about = f"{self.mode} {self.size}".encode()
        object.__setattr__(self, "sha256", hashlib.sha256(about + self.opened().tobytes()).hexdigest())

    def opened(self) -> Image.Image:
        """The image: what of its middle has the shape of `size`, resized. Raises UserError as `open_rgb` does."""
        image = open_rgb(self.path)
        if image.size != self.size:
            image = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        return image.convert(self.mode)


def opened_inputs(inputs: Sequence[Mapping[str, FilePicture]]) -> dict[str, Any]:
    """The images that go with the prompts of a call, by argument of it: a list, or that of one prompt."""
    if len(inputs) == 1:
        return {name: picture.opened() for name, picture in inputs[0].items()}
    return {name: [of_prompt[name].opened() for of_prompt in inputs] for name in (inputs[0] if inputs else {})}


def save_picture(picture: FilePicture, path: Path) -> None:
    """Write the image as it goes into a pipeline to the PNG `path`, unless that is there with the same pixels."""
    if read_key(path) == picture.sha256:
        return
    about = PngImagePlugin.PngInfo()
    about.add_text(KEY, picture.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        picture.opened().save(partial, format="PNG", pnginfo=about)
