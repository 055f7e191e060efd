"""Prompt sets: text files with one prompt a line; lines that start with `#` are comments."""

import importlib.resources
from pathlib import Path

from dmquant.errors import UsageError, UserError, unknown

SUFFIX = ".txt"


def prompt_sets() -> dict[str, int]:
    """The prompt sets that come with the package, by name, and how many prompts each has."""
    return {name: len(_prompts_in(text)) for name, text in _packaged().items()}


def load_prompts(name_or_file: str, number: int | None = None) -> list[str]:
    """The first `number` prompts of a packaged set or of a file, or all of them.

    Raises UsageError for an unknown set and for more prompts than there are, UserError for a file without any.
    """
    packaged = _packaged()
    if name_or_file in packaged:
        prompts = _prompts_in(packaged[name_or_file])
    elif Path(name_or_file).is_file():
        prompts = _prompts_in(_read(Path(name_or_file)))
    else:
        raise unknown("prompt set", name_or_file, packaged, f"it is one of {', '.join(packaged)}, or a text file")
    if not prompts:
        raise UserError(f"{name_or_file} holds no prompts: write one a line")
    if number is None:
        return prompts
    if not 1 <= number <= len(prompts):
        raise UsageError(f"{number} prompts asked for, but '{name_or_file}' has {len(prompts)}")
    return prompts[:number]


def _packaged() -> dict[str, str]:
    files = importlib.resources.files("dmquant.configs").joinpath("prompts").iterdir()
    texts = {file.name.removesuffix(SUFFIX): file for file in files if file.name.endswith(SUFFIX)}
    return {name: texts[name].read_text("utf-8") for name in sorted(texts)}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _prompts_in(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
