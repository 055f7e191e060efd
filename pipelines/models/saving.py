"""Write a quantized pipeline as a folder that works anywhere: whole or not at all."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmquant.diffusers.quantizer import make_portable, save_pipeline
from dmquant.errors import UserError
from dmquant.host import checksums
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.shared_parts import SharedParts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTIAL, REPLACED = ".part", ".replaced"
CARD = "README.md"
MARK = ".dmquant-is-writing-here"
NARROW = (torch.float16, torch.bfloat16)
WRITTEN = (
    *("config.json", "*_config.json", "diffusion_pytorch_model*.safetensors*", "model*.safetensors*"),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "tokenizer.model", "*.jinja"),
)
"""Names of the files that diffusers and transformers write for a part of a pipeline."""


def save_whole(
    pipeline: "DiffusionPipeline",
    folder: Path,
    card: str,
    backbone: str,
    shared: SharedParts | None = None,
) -> Path | None:
    """Save `pipeline` with its model card to `folder`; what is there is replaced at the end.

    Parts other than the `backbone` are taken from `shared`, or put there, where it is given. Files of a folder that was
    replaced which are not of a pipeline are kept beside it: returns where, or None if there were none.
    """
    folder = folder.resolve()
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists() and not (partial / MARK).exists():
        raise UserError(f"{partial} is in the way, and is no unfinished model of dmquant: move or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / MARK).touch()
    try:
        _save(pipeline, partial, backbone, shared)
        (partial / CARD).write_text(card, encoding="utf-8")
        checksums.write(partial)
        replaced = _put_aside(folder)
        try:
            partial.replace(folder)
        except BaseException:
            if replaced is not None:
                replaced.replace(folder)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (folder / MARK).unlink()
    return None if replaced is None else _without_pipeline(replaced)


def _save(pipeline: "DiffusionPipeline", folder: Path, backbone: str, shared: SharedParts | None) -> None:
    if shared is not None and shared.fill(folder):
        getattr(pipeline, backbone).save_pretrained(folder / backbone, safe_serialization=True)
        make_portable(folder)
        return
    save_pipeline(pipeline, folder)
    if shared is not None:
        shared.keep(folder, backbone)


def _put_aside(folder: Path) -> Path | None:
    """Rename a folder, to a name that is free; returns where it is now, or None where there was none."""
    if not folder.exists():
        return None
    number, aside = 1, folder.with_name(folder.name + REPLACED)
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}{REPLACED}-{number}")
    folder.replace(aside)
    return aside


def _without_pipeline(folder: Path) -> Path | None:
    """Remove the files of a pipeline from a folder, and folders that are empty then; None if nothing is left of it."""
    for path in _written(folder):
        path.unlink()
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    return folder if folder.exists() else None


def _written(folder: Path) -> list[Path]:
    """The files of a pipeline folder that belong to the pipeline."""
    if not (folder / folders.INDEX).is_file():
        return []
    of_parts = [path for name in folders.components(folder) for path in (folder / name).glob("*") if path.is_file()]
    known = [path for path in of_parts if any(fnmatch(path.name, pattern) for pattern in WRITTEN)]
    return [*known, *(path for name in (folders.INDEX, CARD, checksums.NAME) if (path := folder / name).is_file())]


def narrow_exactly(module: nn.Module) -> None:
    """Hold each float32 tensor that `module` saves in 16 bits where that loses nothing, in place.

    Weights published in 16 bits and computed with in float32 go back to the 16 bits they came from, so that what
    stays in high precision does not cost double on disk. Loading in float32 gives the same numbers again.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        exact = (dtype for dtype in NARROW if tensor.dtype == torch.float32 and _survives(tensor, dtype))
        tensor.data = tensor.data.to(next(exact, tensor.dtype))


def _survives(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def model_card(name: str, recipe: str, weights: str, activations: str, pipeline: str, dtype: torch.dtype) -> str:
    """README.md of a quantized pipeline: what it is and the lines that load it."""
    return f"""---
library_name: diffusers
tags: [dmquant, quantized, text-to-image]
---

# {name}, weights in {weights}, activations in {activations}

A diffusers `{pipeline}` whose backbone dmquant quantized with the recipe `{recipe}`. Scales and layers are in
`config.json` of the backbone, codes in its safetensors.

```python
import dmquant  # registers the quantizer with diffusers
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", torch_dtype={dtype})
```
"""
