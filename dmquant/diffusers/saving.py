"""Save a pipeline as a folder that works anywhere."""

import json
from pathlib import Path
from typing import Any

from dmquant.host import checksums
from dmquant.host.files import as_umask_says


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """`save_pretrained`, `make_portable`, and the checksums of all that is there. Raises OSError as the disk does."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    make_portable(Path(folder))
    for file in Path(folder).glob("*/*.safetensors"):
        as_umask_says(file)
    checksums.write(Path(folder))


def make_portable(folder: Path) -> None:
    """Remove from a pipeline folder's configurations what would tie it to this machine or to one dtype.

    diffusers writes local paths as `_name_or_path`. And transformers loads a text encoder in the dtype that its config
    names while diffusers loads everything else in float32, so by default the two would not fit together.
    """
    for file in (folder / "model_index.json", *folder.glob("*/*config.json")):
        content = json.loads(file.read_text())
        portable = {key: value for key, value in content.items() if key != "_name_or_path"}
        if "dtype" in portable:
            portable["dtype"] = "float32"
        if portable != content:
            file.write_text(json.dumps(portable, indent=2) + "\n")
