"""The full-precision pipeline that a run starts from, and whether it is the one that the run started from before."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.yaml_loading import load_yaml
from dmquant.pipelines.models.hashes import pipeline_hashes
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings

NOTE = "source"
SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A pipeline's folder, the SHA-256 of each file by its relative path, and the key that stands for all of them."""

    folder: Path
    sha256: dict[str, str]
    key: str


def source_of(settings: Settings, path: Path, console: Console) -> Source:
    """The pipeline in the folder `path`, with the LoRAs that are fused into it; each file is read once, and not at all
    if an earlier command has read it."""
    with console.bar("hash of the weights") as bar:
        hashes = processes.current().on_main(lambda: pipeline_hashes(path, settings.family.without, bar))
    hashes |= {lora.key: lora.sha256 for lora in settings.model.loras}
    return Source(path, hashes, fingerprint(files=hashes))


def resumed_source(settings: Settings, path: Path, folder: RunFolder, console: Console) -> Source:
    """`source_of`, under the key that `folder` knows the same files by; files that changed since are named."""
    now = source_of(settings, path, console)
    before = processes.current().on_main(lambda: _before(folder))
    if before is not None:
        changed = _changed(before, now.sha256)
        if not changed:
            now = Source(path, now.sha256, before["key"])
        else:
            shown = ", ".join(changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
            console.say(f"note: changed since the last run: {shown}; what depends on it is made again")
    folder.note(NOTE, {"sha256": now.sha256, "key": now.key})
    return now


def _before(folder: RunFolder) -> dict[str, Any] | None:
    """Files and key of the last run in `folder`; `every` is whether it knew all files, as versions after 0.2 do."""
    if note := folder.notes(NOTE):
        return note | {"every": True}
    try:
        settings = load_yaml((folder.path / runfolder.SETTINGS).read_text("utf-8"))
        hashes = settings["model"]["sha256"]
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return None
    return {"sha256": hashes, "key": fingerprint(files=hashes), "every": False}


def _changed(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Names of the files that are others than before, those that came and went included where all were known."""
    known = before["sha256"]
    names = known.keys() | now.keys() if before["every"] else known.keys() & now.keys()
    return sorted(name for name in names if known.get(name) != now.get(name))
