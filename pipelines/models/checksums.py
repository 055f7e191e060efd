"""Whether a pipeline that was saved with checksums is still what was saved, asked while it loads."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmquant.errors import UserError
from dmquant.host import checksums
from dmquant.pipelines.models import folders


@contextlib.contextmanager
def checked(folder: Path, leave_out: Collection[str] = ()) -> Iterator[None]:
    """Read every file that a pipeline is loaded from, in threads, while the block loads it; not those read before.

    UserError, at the end, for a file that is not what was saved; whatever else went wrong in the block came of that.
    Folders without checksums.json, as earlier versions wrote them, are taken as they are.
    """
    if not (folder / checksums.NAME).is_file():
        yield
        return
    with ThreadPoolExecutor(1) as background:
        found = background.submit(checksums.faults, folder, _loaded(folder, leave_out), again=False)
        try:
            yield
        except Exception:
            _refuse(folder, found.result())
            raise
        _refuse(folder, found.result())


def _loaded(folder: Path, leave_out: Collection[str]) -> Callable[[str], bool]:
    """Whether a pipeline is loaded from the file of that relative path."""
    parts = set(folders.components(folder)) - set(leave_out)

    def is_loaded(name: str) -> bool:
        part, _, rest = name.partition("/")
        return name == folders.INDEX or (part in parts and "/" not in rest and Path(rest).suffix in folders.READ)

    return is_loaded


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        more = f" and {len(faults) - 1} more (`dmquant inspect --verify` names all)" if len(faults) > 1 else ""
        raise UserError(
            f"{folder}: {faults[0]}{more}: get the model again, or remove {checksums.NAME} if you changed it yourself"
        )
