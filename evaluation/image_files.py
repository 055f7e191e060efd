"""The files of a folder that are images, their order, and those of two folders that belong together: by names alone."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dmquant.errors import UserError

PNG = ".png"
SUFFIXES = frozenset({PNG, ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
SAME_KIND = {".jpeg": ".jpg", ".tif": ".tiff"}
SHOWN = 3
_DIGITS = re.compile(r"([0-9]+)")


def in_folder(folder: Path) -> list[Path]:
    """The PNG files directly in `folder` or, where it has none, its images of other kinds; numbers sort as numbers.

    Names that begin with a dot are unfinished or not ours. Raises UserError where there are none, and where two have
    names that differ in the spelling of their suffix only.
    """
    found = [path for path in _files(folder) if kind_of(path)]
    images = [path for path in found if kind_of(path) == PNG] or found
    if not images:
        raise UserError(f"no image in {folder}")
    images.sort(key=_place)
    for one, other in itertools.pairwise(images):
        if name_of(one) == name_of(other):
            raise UserError(f"{folder} holds both {one.name} and {other.name}: remove one, or give it another name")
    return images


def below(folder: Path) -> list[Path]:
    """The images in `folder` and its subfolders, links to folders included, sorted; UserError where there are none."""
    images = sorted(path for path in _files_below(folder) if path.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"no image in {folder}")
    return images


def check_one_kind(folder: Path) -> None:
    """UserError for a folder with images of several kinds, of which some would be left out."""
    kinds = [kind for path in _files(folder) if (kind := kind_of(path))]
    if PNG in kinds and len(set(kinds)) > 1:
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        raise UserError(f"{folder} holds images of several kinds ({counts}): keep each kind in a folder of its own")


def check_same_names(have: Sequence[Path], other: Sequence[Path], other_folder: Path) -> None:
    """UserError where `other_folder`, with the images `other`, lacks one of the name and kind of those in `have`."""
    there = set(map(name_of, other))
    missing = [path.name for path in have if name_of(path) not in there]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        kinds = sorted({kind_of(path) for path in other} - {kind_of(path) for path in have})
        held = f"; it holds {', '.join(kinds)} files" if kinds else ""
        raise UserError(
            f"{other_folder} lacks {len(missing)} of {len(have)} images ({shown}){held}: generate them first"
        )


def name_of(path: Path) -> tuple[str, str]:
    """The name by which an image has its twin in another folder: stem and kind, however the suffix is spelled."""
    return path.stem, kind_of(path)


def kind_of(path: Path) -> str:
    """The kind of an image file by its suffix, in one spelling; "" for other files."""
    suffix = path.suffix.lower()
    return SAME_KIND.get(suffix, suffix) if suffix in SUFFIXES else ""


def _place(path: Path) -> tuple:
    """A sort key: img2.png before img10.png, and 99999.png before 100000.png."""
    parts = _DIGITS.split(path.stem)
    return [int(part) if index % 2 else part.casefold() for index, part in enumerate(parts)], path.stem, kind_of(path)


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    try:
        with os.scandir(folder) as entries:
            yield from (Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_file())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and all below it; a folder that is reached twice, as by a link into itself, is read once."""
    seen, waiting = set(), [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
            waiting += [Path(entry) for entry in shown if entry.is_dir()]
            yield from (Path(entry) for entry in shown if entry.is_file())
        except NotADirectoryError:
            raise UserError(f"{here} is not a folder of images") from None
        except OSError as error:
            raise UserError(f"cannot read {here}: {error.strerror}") from error
