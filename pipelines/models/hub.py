"""Pipelines from the Hugging Face Hub: the cache first, then a download that says beforehand how big it is."""

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from dmquant.errors import UserError
from dmquant.host.units import about_text, size_text
from dmquant.pipelines.models import folders, weights

ANSWER_SECONDS = 10
_WEIGHTS = re.compile(r"[^/]+/(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
_PART = re.compile(r"diffusion_pytorch_model[^/]*\.safetensors(\.index[^/]*\.json)?")
CONFIG = "config.json"
_CONFIGURATION = [folders.INDEX, "*/config.json", "*/tokenizer_config.json"]


def cached(repo: str) -> Path | None:
    """The snapshot folder of a pipeline in the local cache, complete or not; None if nothing is there."""
    index = huggingface_hub.try_to_load_from_cache(repo, folders.INDEX)
    return Path(index).parent if isinstance(index, str) else None


def cached_pipelines() -> list[str]:
    """Ids of all repositories in the local cache that hold a pipeline's index."""
    try:
        repositories = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except huggingface_hub.CacheNotFound:
        return []
    return sorted(repository.repo_id for repository in repositories if cached(repository.repo_id))


def reachable(seconds: float) -> bool:
    """Whether the Hub answers within that time."""
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # as in _explaining
        return False
    return True


def configuration(repo: str) -> tuple[Path, int | None]:
    """A folder with at least a pipeline's configuration, and the bytes of its weights (None if it is cached)."""
    folder = cached(repo)
    if folder is not None:
        return folder, None
    size = _weight_bytes(repo, None)
    with _explaining(repo, size):
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=_CONFIGURATION)), size


def pipeline(repo: str, size: int | None, without: Collection[str], say: Callable[[str], None]) -> Path:
    """The folder of a whole pipeline, less the parts named in `without`: from the cache, else downloaded.

    `size` is about how many bytes that is. Raises UserError where the model is neither cached nor to be had.
    """
    folder = cached(repo)
    if folder is not None and not folders.missing_parts(folder, frozenset(without)):
        return folder
    size = _weight_bytes(repo, size)
    _check_disk(repo, size)
    say(f"downloading {repo} ({about_text(size)}) from the Hub into {constants.HF_HUB_CACHE}")
    from diffusers import DiffusionPipeline

    with _explaining(repo, size):
        return Path(DiffusionPipeline.download(repo, use_safetensors=True, **dict.fromkeys(without)))


def part(repo: str, say: Callable[[str], None]) -> Path:
    """The folder of a model that is a part of pipelines, such as a ControlNet: from the cache, else downloaded.

    Raises UserError where it is neither cached nor to be had.
    """
    config = huggingface_hub.try_to_load_from_cache(repo, CONFIG)
    if isinstance(config, str) and not weights.missing_files(Path(config).parent):
        return Path(config).parent
    with _explaining(repo, None):
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=ANSWER_SECONDS)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    listed = {name: size for name, size in sizes.items() if _PART.fullmatch(name)}
    plain = {name: size for name, size in listed.items() if not weights.is_variant(name)} or listed
    size = sum(plain.values())
    _check_disk(repo, size)
    say(f"downloading {repo} ({about_text(size)}) from the Hub into {constants.HF_HUB_CACHE}")
    with _explaining(repo, size):
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=[CONFIG, *plain]))


def _weight_bytes(repo: str, known: int | None) -> int | None:
    """Bytes of a repository's weights; asks the Hub, so it also tells at once whether the Hub can be reached."""
    with _explaining(repo, known):
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=ANSWER_SECONDS)
    return known or sum(file.size or 0 for file in info.siblings or () if _WEIGHTS.fullmatch(file.rfilename)) or None


def _check_disk(repo: str, size: int | None) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if size is not None and free < size:
        raise UserError(
            f"{repo} is {about_text(size)} but {existing} has only {size_text(free)} free: "
            "make room, or set HF_HOME to a folder on another disk"
        )


@contextlib.contextmanager
def _explaining(repo: str, size: int | None) -> Iterator[None]:
    """Turn whatever stops the Hub's client into a UserError."""
    try:
        yield
    except Exception as error:  # its HTTP library, and so what it raises, went from requests to httpx to httpx2
        raise _explained(repo, size, error) from error


def _explained(repo: str, size: int | None, error: Exception) -> UserError:
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo} is gated: accept its licence on the Hub and log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"the Hub has no model '{repo}', or it is private: check the name or run `hf auth login`")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"the disk is full: {repo} is {about_text(size)}; set HF_HOME to a folder on another disk")
    reason = next(iter(str(error).split("\n")), "").strip() or type(error).__name__
    return UserError(
        f"{repo} ({about_text(size)}) is not in the local cache and cannot be had from the Hub ({reason}): "
        "give a local copy, as in `dmquant run /path/to/folder`, or set HF_HOME to a cache that holds it"
    )
