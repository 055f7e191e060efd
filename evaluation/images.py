"""Image files as tensors, and folders of images that belong together by name."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmquant.errors import UserError
from dmquant.files import replacing

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def open_rgb(path: Path) -> Image.Image:
    """The image at `path` as 8-bit RGB; transparent pixels are composited on white.

    Raises UserError when the file is missing, damaged or truncated, or holds more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise UserError(f"{path} has more than 8 bits a channel: convert it to 8-bit RGB")
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error}): remove it or make it again") from error


def load_image(path: Path) -> Tensor:
    """The image at `path` as uint8 [3, H, W]; errors as in `open_rgb`."""
    return torch.from_numpy(np.array(open_rgb(path))).permute(2, 0, 1).contiguous()


def save_image(image: Image.Image | Tensor, path: Path) -> None:
    """Write `image` (PIL, or a uint8 tensor [3, H, W]) to `path` as PNG, whole or not at all."""
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def generated_images(folder: Path) -> list[Path]:
    """The PNG files directly in `folder`, sorted by name; raises UserError when there are none."""
    return _some(_listed(folder, "*.png"), folder, "PNG image")


def any_images(folder: Path) -> list[Path]:
    """The images in `folder` and its subfolders, sorted; raises UserError when there are none."""
    return _some((path for path in _listed(folder, "**/*") if path.suffix.lower() in SUFFIXES), folder, "image")


def matching_images(folders: Mapping[str, Path], count: int) -> dict[str, list[Path]]:
    """The PNG files of several named folders; raises UserError unless each holds `count`, of the same names in all."""
    images = {name: generated_images(folder) for name, folder in folders.items()}
    first = next(iter(images.values()))
    for name, paths in images.items():
        if len(paths) != count:
            raise UserError(
                f"{folders[name]} ({name}) has {len(paths)} images for {count} prompts: generate them again"
            )
        _require_same_names(first, paths, folders[name])
    return images


@dataclass(frozen=True)
class ImagePairs:
    """Images of the same name in two folders: same prompt, seed and initial noise, so only the network differs."""

    reference: list[Path]
    quantized: list[Path]

    @classmethod
    def open(cls, reference: Path, quantized: Path) -> "ImagePairs":
        """Match the PNG files of two folders by name; raises UserError when one lacks an image that the other has."""
        pairs = cls(generated_images(reference), generated_images(quantized))
        _require_same_names(pairs.reference, pairs.quantized, quantized)
        _require_same_names(pairs.quantized, pairs.reference, reference)
        return pairs

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def paths(self) -> Iterator[tuple[Path, Path]]:
        """(reference, quantized) of every pair, as files."""
        return zip(self.reference, self.quantized, strict=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (reference, quantized), both uint8 [3, H, W]; raises UserError when their sizes differ."""
        for reference_path, quantized_path in self.paths:
            reference, quantized = load_image(reference_path), load_image(quantized_path)
            if reference.shape != quantized.shape:
                raise UserError(
                    f"{quantized_path} is {_size(quantized)} but {reference_path} is {_size(reference)}: "
                    "generate both at one size"
                )
            yield reference, quantized


def _listed(folder: Path, pattern: str) -> list[Path]:
    """Files matching `pattern` in `folder`, sorted; names starting with a dot are unfinished or not ours."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def _some(paths: Iterable[Path], folder: Path, kind: str) -> list[Path]:
    found = list(paths)
    if not found:
        raise UserError(f"no {kind} in {folder}")
    return found


def _require_same_names(have: list[Path], other: list[Path], other_folder: Path) -> None:
    missing = sorted({path.name for path in have} - {path.name for path in other})
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{other_folder} lacks {len(missing)} of {len(have)} images ({shown}): generate them first")


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
