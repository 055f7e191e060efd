"""The identity of a model: SHA-256 of the files that decide what a pipeline computes."""

from collections.abc import Callable, Collection
from pathlib import Path

from dmquant.host import checksums
from dmquant.host.hashes import sha256_once
from dmquant.pipelines.models import folders


def identifying_files(folder: Path, leave_out: Collection[str] = ()) -> list[Path]:
    """Every file that a pipeline is loaded from: its index, and what is read of its parts but those to `leave_out`."""
    parts = [folder / name for name in folders.components(folder) if name not in leave_out]
    of_parts = [path for part in parts for path in part.glob("*") if path.suffix in folders.READ and path.is_file()]
    return sorted({*folder.glob("*.json"), *of_parts} - {folder / checksums.NAME})


def pipeline_hashes(
    folder: Path, leave_out: Collection[str] = (), progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """SHA-256 of the identifying files by relative path in POSIX form; `progress(done, total)` counts bytes."""
    files = identifying_files(folder, leave_out)
    total, done = sum(path.stat().st_size for path in files), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return {path.relative_to(folder).as_posix(): sha256_once(path, on_bytes) for path in files}
