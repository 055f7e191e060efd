"""Image files as tensors, videos as their frames, and folders of images that belong together by name."""

import contextlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from dmquant.errors import UserError
from dmquant.evaluation import image_files
from dmquant.evaluation.png import KEY, OURS, SOFTWARE
from dmquant.host.files import replacing
from dmquant.host.hashes import sha256_once

EXIF_ORIENTATION = 0x0112
STRIP = 4  # frames of a video that stand for it in a picture
LYING = range(5, 9)  # orientations that exchange width and height
PNG_DEPTH = 24  # where a PNG says its bits a channel: Pillow takes 16 bits in colour for 8, and drops the lower ones


def open_rgb(path: Path) -> Image.Image:
    """The image at `path` as 8-bit RGB, turned as its EXIF data say; transparent pixels are composited on white.

    Of a video that dmquant made it is the frame in the middle. Raises UserError when the file is missing, damaged or
    truncated, holds more than 8 bits a channel, is another animation, or has more pixels than Pillow lets pass (179
    million).
    """
    with _opened(path) as image:
        if (frames := _frames(image)) > 1:
            image.seek(frames // 2)
        ImageOps.exif_transpose(image, in_place=True)
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that `open_rgb` gives, from the file's header alone; errors as there, damaged pixels aside."""
    with _opened(path) as image:
        # Pillow gives the size of a TIFF as turned, and of other formats as stored.
        turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in LYING
        return image.size[::-1] if turned else image.size


def number_of_frames(path: Path) -> int:
    """Frames of a video that dmquant made; 1 for an image. Errors as in `image_size`."""
    with _opened(path) as image:
        return _frames(image)


def load_frames(path: Path) -> Tensor:
    """The video at `path` as uint8 [frames, 3, H, W], or the image as [3, H, W]; errors as in `open_rgb`."""
    with _opened(path) as image:
        frames = _frames(image)
        if frames > 1:
            return torch.stack([_tensor(_frame(image, number)) for number in range(frames)])
    return load_image(path)


def open_strip(path: Path) -> tuple[Image.Image, int]:
    """Frames of the video at `path`, evenly spaced, side by side, and how many; or the image at `path`, and 1.

    Errors as in `open_rgb`.
    """
    with _opened(path) as image:
        frames = _frames(image)
        if frames > 1:
            shown = np.linspace(0, frames - 1, min(frames, STRIP)).round().astype(int).tolist()
            strip = Image.new("RGB", (image.width * len(shown), image.height))
            for place, number in enumerate(shown):
                strip.paste(_frame(image, number), (place * image.width, 0))
            return strip, len(shown)
    return open_rgb(path), 1


def image_sha256(path: Path) -> str:
    """SHA-256 of the file at `path` in hexadecimal; raises UserError when it is missing or cannot be read."""
    try:
        return sha256_once(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def load_image(path: Path) -> Tensor:
    """The image at `path` as uint8 [3, H, W]; errors as in `open_rgb`."""
    return _tensor(open_rgb(path))


def save_image(image: Image.Image | Tensor, path: Path) -> None:
    """Write `image` (PIL, or a uint8 tensor [3, H, W]) to `path` as PNG, whole or not at all.

    Raises UserError where the disk refuses.
    """
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    about = PngImagePlugin.PngInfo()
    about.add_text(SOFTWARE, OURS)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=about)


def generated_images(folder: Path) -> list[Path]:
    """The images directly in `folder`, in the order of the numbers in their names: PNG, or where there is none another.

    Raises UserError when there are none.
    """
    return image_files.in_folder(folder)


def any_images(folder: Path) -> list[Path]:
    """The images in `folder` and its subfolders, sorted; raises UserError when there are none."""
    return image_files.below(folder)


def matching_images(folders: Mapping[str, Path], count: int) -> dict[str, list[Path]]:
    """The images of several named folders; raises UserError unless each holds `count`, of the same names in all."""
    images = {name: generated_images(folder) for name, folder in folders.items()}
    first = next(iter(images.values()))
    for name, paths in images.items():
        if len(paths) != count:
            raise UserError(
                f"{folders[name]} ({name}) has {len(paths)} images for {count} prompts: generate them again"
            )
        image_files.check_same_names(first, paths, folders[name])
    return images


@dataclass(frozen=True)
class ImagePairs:
    """Images of the same name in two folders: same prompt, seed and initial noise, so only the network differs."""

    reference: list[Path]
    quantized: list[Path]

    @classmethod
    def open(cls, reference: Path, quantized: Path) -> "ImagePairs":
        """Match the images of two folders by name; raises UserError when one lacks an image that the other has."""
        pairs = cls(generated_images(reference), generated_images(quantized))
        image_files.check_same_names(pairs.reference, pairs.quantized, quantized)
        image_files.check_same_names(pairs.quantized, pairs.reference, reference)
        return pairs

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def paths(self) -> Iterator[tuple[Path, Path]]:
        """(reference, quantized) of every pair, as files."""
        return zip(self.reference, self.quantized, strict=True)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every pair; raises UserError when its two images differ, or one is no readable image."""
        return [_common_size(reference, quantized) for reference, quantized in self.paths]

    def batches(self, pixels: int) -> list[range]:
        """The pairs in order, cut into runs of one size with up to `pixels` an image side, at least one pair each."""
        batches: list[range] = []
        for index, (width, height) in enumerate(self.sizes):
            last = batches[-1] if batches else range(0)
            if last and self.sizes[last.start] == (width, height) and (len(last) + 1) * width * height <= pixels:
                batches[-1] = range(last.start, index + 1)
            else:
                batches.append(range(index, index + 1))
        return batches

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """(reference, quantized) of one pair, both uint8 [3, H, W], or [frames, 3, H, W]; errors as in `open_rgb`.

        Raises UserError also for two videos of unequal length.
        """
        pair = load_frames(self.reference[index]), load_frames(self.quantized[index])
        if pair[0].shape != pair[1].shape:
            raise UserError(
                f"{self.quantized[index]} and {self.reference[index]} differ in their number of frames: generate both "
                "alike"
            )
        return pair


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A still image of 8 bits a channel, as Pillow opens it; what goes wrong with it in the block is a UserError."""
    try:
        with path.open("rb") as file:
            header = file.read(PNG_DEPTH + 1)
            file.seek(0)
            image = Image.open(file)
            deep_png = image.format == "PNG" and header[PNG_DEPTH] > 8
            if deep_png or image.mode == "F" or image.mode.startswith("I"):
                raise UserError(f"{path} has more than 8 bits a channel: convert it to 8-bit RGB")
            # A JPEG with a preview or a depth map is an MPO of several frames; the first is the picture.
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames not in (1, _frames(image)):
                raise UserError(f"{path} is animated ({frames} frames): save the frame that is meant as a still image")
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error}): remove it or make it again") from error


def _frames(image: Image.Image) -> int:
    """Frames of an opened video of dmquant's; 1 for all else."""
    return getattr(image, "n_frames", 1) if image.format == "PNG" and KEY in image.info else 1


def _frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    return image.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _common_size(reference: Path, quantized: Path) -> tuple[int, int]:
    size, other = image_size(quantized), image_size(reference)
    if size != other:
        ours, theirs = ("x".join(map(str, sides)) for sides in (size, other))
        raise UserError(f"{quantized} is {ours} but {reference} is {theirs}: generate both at one size")
    return size
