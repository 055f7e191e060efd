"""Prompt sets: lists that come with the package, lists that other packages hold, and files; whole or in part."""

import importlib.resources
import os
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dmquant.errors import UsageError, UserError, unknown
from dmquant.host.files import in_package
from dmquant.pipelines.prompts.readers import NO_STYLE, SUFFIXES, Listed, read_file, text_lines

SUFFIX = ".txt"


@dataclass(frozen=True)
class PromptSet:
    """Prompts and where they come from: the first or the drawn ones of the `total` prompts of the list `name`.

    `styles` has one entry a prompt, empty where the list knows no styles. `seed` is None where none was drawn;
    `comments` counts the lines of the file that were left out. `pictures` are files of images, one a prompt, by the
    kind of image; none where the list has no column of them.
    """

    name: str
    prompts: tuple[str, ...]
    styles: tuple[str, ...]
    total: int
    seed: int | None = None
    comments: int = 0
    pictures: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    def take(self, number: int, seed: int | None = None) -> "PromptSet":
        """The first `number` prompts, or that many drawn without replacement; in the order of the list either way.

        The same seed draws the same prompts on every machine and version of Python, and a greater `number` draws all of
        them too. Raises UsageError for more prompts than there are.
        """
        if not 1 <= number <= len(self.prompts):
            raise UsageError(f"{number} prompts asked for, but '{self.name}' has {len(self.prompts)}")
        chosen = range(number) if seed is None else _drawn(len(self.prompts), number, seed)
        return replace(
            self,
            prompts=tuple(self.prompts[index] for index in chosen),
            styles=tuple(self.styles[index] for index in chosen),
            seed=seed,
            pictures={kind: tuple(files[index] for index in chosen) for kind, files in self.pictures.items()},
        )

    def describe(self) -> str:
        """Words for the report, as in `captions_val2014.json, 1024 of 40504, seed 0`, and the count by style."""
        count = len(self.prompts)
        if count == self.total:
            part = f"all {count}"
        elif self.seed is None:
            part = f"first {count} of {self.total}"
        else:
            part = f"{count} of {self.total}, seed {self.seed}"
        left_out = f"; {self.comments} lines with # left out" if self.comments else ""
        styles = Counter(style for style in self.styles if style != NO_STYLE)
        by_style = ", ".join(f"{number} {style}" for style, number in styles.items())
        return f"{self.name}, {part}{f' ({by_style})' if by_style else ''}{left_out}"


@dataclass(frozen=True)
class Installed:
    """A prompt set in a file of a Python package, which is read and never imported."""

    package: str
    file: str
    column: str
    install: str


INSTALLED: Mapping[str, Installed] = {
    # VBench's requirements pin an old transformers; the list needs none of them.
    "vbench": Installed(
        "vbench", "VBench_full_info.json", "prompt_en", install="pip install --no-deps vbench==0.1.5 (0.4 MB)"
    ),
}


def prompt_sets() -> dict[str, int]:
    """The prompt sets that come with the package, by name, and how many prompts each has."""
    return {name: len(text_lines(text)) for name, text in _packaged().items()}


def read_prompts(source: str) -> PromptSet:
    """The whole prompt set that `source` stands for.

    That is a packaged set, one of INSTALLED, a file, or HPSv2's benchmark folder; a column of a file is named behind a
    colon, as in `captions.csv:caption`. Prompts may repeat; those without text are left out.

    Raises UsageError for an unknown set or column, UserError for a file that is unreadable or without prompts and for
    a package that is not installed.
    """
    packaged = _packaged()
    path, column = _file_and_column(source)
    if source in packaged:
        listed = Listed({NO_STYLE: text_lines(packaged[source])})
    elif source in INSTALLED:
        listed = read_file(_installed_file(source), INSTALLED[source].column)
    elif os.path.exists(path):
        listed = read_file(path, column)
    elif path.suffix.partition(":")[0].lower() in SUFFIXES:
        raise UserError(f"there is no file {source}")
    else:
        known = [*packaged, *INSTALLED]
        raise unknown("prompt set", source, known, f"it is one of {', '.join(known)}, or a file")
    prompts = tuple(prompt for of_style in listed.by_style.values() for prompt in of_style)
    if not prompts:
        raise UserError(f"{source} holds no prompts")
    styles = tuple(style for style, of_style in listed.by_style.items() for _ in of_style)
    # The last part of a path is what means the same on another machine; of a packaged set it is the name.
    name = path.absolute().name + ("" if column is None else f":{column}")
    pictures = {kind: tuple(files) for kind, files in listed.pictures.items()}
    return PromptSet(name, prompts, styles, total=len(prompts), comments=listed.comments, pictures=pictures)


def load_prompts(source: str, number: int | None = None, seed: int | None = None) -> list[str]:
    """All prompts of a set, the first `number`, or `number` drawn with `seed`; raises as `read_prompts` and `take`."""
    found = read_prompts(source)
    return list((found if number is None else found.take(number, seed)).prompts)


def _drawn(total: int, number: int, seed: int) -> list[int]:
    """Sorted indices. Of Python's generator only `random()` is promised to stay the same from version to version."""
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(total)]
    return sorted(sorted(range(total), key=keys.__getitem__)[:number])


def _file_and_column(source: str) -> tuple[Path, str | None]:
    """The file that `source` names and its column; a file name may hold colons itself (`C:\\prompts.csv`)."""
    splits = [len(source), *(index for index, character in enumerate(source) if character == ":")]
    for end in splits:
        path = Path(os.path.expanduser(source[:end]))
        if os.path.exists(path):  # unlike Path.exists, False for a name too long to be one
            return path, source[end + 1 :] or None
    return Path(source), None


def _installed_file(name: str) -> Path:
    listed = INSTALLED[name]
    file = in_package(listed.package, listed.file)
    if file is None:
        raise UserError(f"the prompt set {name} is a file of a package that is not installed: {listed.install}")
    return file


def _packaged() -> dict[str, str]:
    files = importlib.resources.files("dmquant.configs").joinpath("prompts").iterdir()
    texts = {file.name.removesuffix(SUFFIX): file for file in files if file.name.endswith(SUFFIX)}
    return {name: texts[name].read_text("utf-8") for name in sorted(texts)}
