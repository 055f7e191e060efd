"""Weights on the Hugging Face Hub: the local cache first, then a download that says beforehand how big it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from dmquant.evaluation.result import UnavailableError
from dmquant.host.units import about_text, size_text

ANSWER_SECONDS = 10
SMALL = ("*.json", "*.txt", "*.model")  # configurations and tokenizers


@dataclass(frozen=True)
class HubFile:
    """A weights file of a Hub repository, under the first of `names` that it has, with the files `beside` it.

    `size` is about how many bytes it has, as far as that is known without the Hub.
    """

    repo: str
    names: tuple[str, ...]
    size: int | None = None
    beside: tuple[str, ...] = ()

    def cached(self) -> Path | None:
        """The file in the local cache, if it and everything beside it are there."""
        for name in self.names:
            found = huggingface_hub.try_to_load_from_cache(self.repo, name)
            if isinstance(found, str) and all((Path(found).parent / other).is_file() for other in self.beside):
                return Path(found)
        return None

    def fetch(self, what: str, remedy: str, say: Callable[[str], None]) -> Path:
        """The file, from the local cache or downloaded; raises UnavailableError, which says `what` and `remedy`."""
        try:
            return self.cached() or self._download(what, say)
        except Exception as error:  # the Hub's HTTP library, and so what it raises, differs between its versions
            raise UnavailableError(
                f"{what} ({about_text(self.size)}) are not in the local cache and cannot be had from {self.repo} on "
                f"the Hub ({first_line(error)}): {remedy}"
            ) from error

    def _download(self, what: str, say: Callable[[str], None]) -> Path:
        info = huggingface_hub.HfApi().model_info(self.repo, files_metadata=True, timeout=ANSWER_SECONDS)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        name = next((name for name in self.names if name in sizes), None)
        if name is None:
            raise LookupError(f"it has no {' or '.join(self.names)}")
        size = about_text(self.size) if sizes[name] is None else size_text(sizes[name])
        say(f"downloading {what} ({size}) from {self.repo} on the Hub into {constants.HF_HUB_CACHE}")
        return Path(huggingface_hub.snapshot_download(self.repo, allow_patterns=[name, *SMALL])) / name


def first_line(error: Exception) -> str:
    """The message of an error, in one line."""
    return str(error).partition("\n")[0].strip() or type(error).__name__
