"""JSON of files that somebody else wrote: bounded in what it may be, in size and in depth."""

import json
from pathlib import Path
from typing import Any

from dmquant.errors import UserError
from dmquant.host.weight_file import check_regular

LARGEST = 1 << 24  # bytes: an index of shards with 100,000 tensors has 10 MB, configurations have some kB


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object from a file; UserError, in one line, for one that is missing, too large, or holds something else.

    What is no regular file, or a link to such, is not opened.
    """
    check_regular(path)
    try:
        if (size := path.stat().st_size) > largest:
            raise UserError(f"{path} has {size / 1e6:.0f} MB: a configuration is smaller, get that file again")
        content = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise UserError(f"{path} cannot be read as JSON: it is nested too deep; get that file again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
