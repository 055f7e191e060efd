"""Where results are kept that any command may use again: DMQUANT_CACHE, or else `~/.cache/dmquant`.

It may be removed at any time.
"""

import contextlib
import os
from pathlib import Path

VARIABLE = "DMQUANT_CACHE"


def folder() -> Path | None:
    """The folder of caches, which need not exist; None where there is no home to have one in."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "dmquant").absolute()
    return None
