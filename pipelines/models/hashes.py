"""Which model this is: SHA-256 of the files that make a pipeline what it is."""

from collections.abc import Callable
from pathlib import Path

from dmquant.host.files import sha256


def identifying_files(folder: Path, backbone: str) -> list[Path]:
    """Every configuration of the pipeline in `folder`, and the weights of its backbone.

    Text encoder and VAE are told apart by their configuration only: they can be 40 times the backbone's size.
    """
    return sorted({*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob(f"{backbone}/*.safetensors")})


def pipeline_hashes(
    folder: Path, backbone: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """SHA-256 of the identifying files by relative path in POSIX form; `progress(done, total)` counts bytes."""
    files = identifying_files(folder, backbone)
    total, done = sum(path.stat().st_size for path in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return {path.relative_to(folder).as_posix(): sha256(path, on_bytes) for path in files}
