"""Where results are kept that any command may use again: DMQUANT_CACHE, or else `~/.cache/dmquant`.

It may be removed at any time.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "DMQUANT_CACHE"


def folder() -> Path | None:
    """The folder of caches, which need not exist; None where there is no home to have one in."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "dmquant").absolute()
    return None


def known(file: Path | None) -> dict[str, Any]:
    """The object in a JSON file of a cache; empty where there is none, or it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
