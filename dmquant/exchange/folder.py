"""Write a pipeline folder for another loader: the backbone as that loader reads it, the other parts copied.

Whole or not at all, tensor by tensor, without a second pass over what was written. A list of what was written stays in
the folder, by which a later export knows what it may replace: anything else in it is the user's.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmquant import __version__
from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.source import Source
from dmquant.exchange.tensor_file import Entry
from dmquant.host import checksums, json_file, owned
from dmquant.host.files import sha256
from dmquant.host.folder_swap import take_place

CONFIG, WEIGHTS, CARD, LIST = "config.json", "diffusion_pytorch_model", "README.md", "dmquant-export.json"
SHARD = 10_000_000_000  # bytes of a file at most, as diffusers saves


@dataclass(frozen=True)
class Folder:
    """What differs in the exported folder from the one that dmquant saved."""

    format: str
    """Name of the format."""
    title: str
    """What people call it, for the model card."""
    entries: Sequence[Entry]
    """The backbone's tensors, by the names that its reader expects."""
    quantization: Mapping[str, Any] | None
    """`quantization_config` of the backbone's config.json; None for none."""
    usage: str
    """Lines of Python that load the folder, for the model card."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`__metadata__` of the weight files."""
    in_one_file: bool = False
    """Whether the backbone has to be one file, whatever its size."""


def write(source: Source, out: Path, target: Folder, progress: Callable[[int, int], None]) -> None:
    """Write the folder `out`, whole or not at all; `progress` is told of bytes written and bytes in all.

    An export that is there is replaced at the end; files of the user's in it stay. Raises UserError where `out` is no
    place for it, where the disk lacks the room, before anything is written, and where it refuses.
    """
    out = _place(source.folder.resolve(), out)
    copies = dict(_others(source))
    written, total = 0, sum(entry.nbytes for entry in target.entries)
    total += sum(path.stat().st_size for path in copies.values())
    tensor_file.check_room(out, total)
    with owned.workspace(out) as room:
        new = room / "new"
        owned.drop(new)  # of a command that was killed
        try:
            backbone = new / source.component
            backbone.mkdir(parents=True)
            for name, entries in _shards(target, backbone):
                told = functools.partial(_tell, progress, written, total)
                tensor_file.fill(backbone / name, entries, target.metadata, told)
                written += sum(entry.nbytes for entry in entries)
            for name, path in copies.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new / name)
                progress(written := written + path.stat().st_size, total)
            config = json_file.read_object(source.folder / source.component / CONFIG)
            config.pop("quantization_config", None)
            if target.quantization is not None:
                config["quantization_config"] = dict(target.quantization)
            (backbone / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (new / CARD).write_text(_card(source, target), encoding="utf-8")
            _list(new, target.format)
            take_place(new, out, room, listed)
        except OSError as error:
            owned.drop(new)
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        except BaseException:
            owned.drop(new)
            raise


def _tell(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def listed(folder: Path) -> Mapping[str, str]:
    """SHA-256 of each file of an export that is as it was written, by its relative path; no names for other folders.

    Size and time of change tell, so that writing need not read what it wrote.
    """
    if not (folder / LIST).is_file():
        return {}
    files = json_file.read_object(folder / LIST).get("files")
    found = {LIST: sha256(folder / LIST)}
    for name, entry in (files if isinstance(files, dict) else {}).items():
        path = folder / name
        if ".." not in path.parts and path.is_file() and entry == _stamp(path):
            found[name] = sha256(path)
    return found


def _place(model: Path, out: Path) -> Path:
    """Where `out` is, links followed; UserError where it is a file, or the model, or the one is in the other."""
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out} is a file, and this format is a folder: choose another place with --out")
    out = out.resolve()
    if model == out or model in out.parents or out in model.parents:
        raise UserError(f"{out} and the model {model} lie in one another: choose another place with --out")
    return out


def _others(source: Source) -> Iterator[tuple[str, Path]]:
    """Relative path and place of each file that is copied: all but the backbone, our records, and what is hidden."""
    for entry in sorted(source.folder.iterdir()):
        if entry.name.startswith(".") or entry.name in (source.component, checksums.NAME, CARD):
            continue
        if entry.is_file():
            yield entry.name, entry
        for place, folders, names in os.walk(entry):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
                yield path.relative_to(source.folder).as_posix(), path


def _shards(target: Folder, folder: Path) -> Iterator[tuple[str, Sequence[Entry]]]:
    """The files by name with their tensors; of several, an index is written into `folder` as diffusers reads it."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in target.entries:
        if shards[-1] and size + entry.nbytes > SHARD and not target.in_one_file:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        yield f"{WEIGHTS}.safetensors", shards[0]
        return
    names = [f"{WEIGHTS}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in target.entries)}, "weight_map": places}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    yield from zip(names, shards, strict=True)


def _card(source: Source, target: Folder) -> str:
    """README.md of the folder: what it is and the lines that load it."""
    return f"""---
library_name: diffusers
tags: [dmquant, quantized, text-to-image]
---

# A {type(source.backbone).__name__} for {target.title}

dmquant {__version__} quantized it by the recipe `{source.recipe.name}` and exported it. It is loaded without dmquant:

```python
{target.usage.strip()}
```
"""


def _list(folder: Path, name: str) -> None:
    """Put the list of the files of a finished folder into it."""
    files = {path.relative_to(folder).as_posix(): _stamp(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    text = json.dumps({"dmquant": __version__, "format": name, "files": files}, indent=1)
    (folder / LIST).write_text(text + "\n", encoding="utf-8")


def rewritten(folder: Path, names: Sequence[str]) -> None:
    """Enter files into the list of an export that were added to it, or written anew."""
    content = json_file.read_object(folder / LIST)
    content["files"] |= {name: _stamp(folder / name) for name in names}
    (folder / LIST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
