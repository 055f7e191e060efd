"""Write a quantized pipeline as a folder that works anywhere: whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmquant.diffusers.saving import make_portable, save_pipeline
from dmquant.errors import UserError
from dmquant.evaluation.report.markdown import cell, code
from dmquant.host import checksums, owned
from dmquant.host.files import as_umask_says, sha256
from dmquant.host.folder_swap import take_place
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.registry import FRAMES, call_parameters
from dmquant.pipelines.models.shared_parts import SharedParts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CARD = "README.md"
NARROW = (torch.float16, torch.bfloat16)


def save_whole(
    pipeline: "DiffusionPipeline",
    folder: Path,
    card: str,
    backbones: Sequence[str],
    shared: SharedParts | None = None,
    records: Mapping[str, str] = MappingProxyType({}),
) -> Path | None:
    """Save `pipeline` with its model card to `folder`; a model that is there is replaced at the end.

    `records` are texts to save beside the card, by name. Parts other than the `backbones` are taken from `shared`, or
    put there, where it is given. Files of the user's in a folder that was replaced stay in it. Returns where a model
    without checksums, of versions up to 0.2, went, or None.
    """
    place, folder = folder, folder.resolve()
    with owned.workspace(folder) as room:
        new = room / "new"
        owned.drop(new)  # of a command that was killed
        new.mkdir(parents=True)
        try:
            _save(pipeline, new, backbones, shared)
            for name, text in {CARD: card, **records}.items():
                (new / name).write_text(text, encoding="utf-8")
            checksums.write(new)
            replaced = take_place(new, folder, room, listed)
        except BaseException:
            owned.drop(new)
            raise
        if owner := owned.of(place / CARD):
            for name, digest in listed(place).items():
                owner.record(place / name, digest=digest)
        return replaced


def listed(folder: Path) -> Mapping[str, str] | None:
    """SHA-256 of each file that was saved in the folder of a model, by its relative path.

    None for a model without checksums, of versions up to 0.2; no names for a folder that is no model.
    """
    try:
        recorded = checksums.recorded(folder)
    except UserError:
        return None if (folder / folders.INDEX).exists() else {}
    return {name: entry["sha256"] for name, entry in recorded.items()} | {
        checksums.NAME: sha256(folder / checksums.NAME)
    }


def _save(pipeline: "DiffusionPipeline", folder: Path, backbones: Sequence[str], shared: SharedParts | None) -> None:
    _put_tokenizers_at_rest(pipeline)
    if shared is not None and shared.fill(folder):
        for name in backbones:
            getattr(pipeline, name).save_pretrained(folder / name, safe_serialization=True)
            as_umask_says(folder / name)
        make_portable(folder)
        return
    save_pipeline(pipeline, folder)
    if shared is not None:
        shared.keep(folder, backbones)


def _put_tokenizers_at_rest(pipeline: "DiffusionPipeline") -> None:
    """Make the files of tokenizers independent of whether they were used: they save how they padded and cut last."""
    for part in pipeline.components.values():
        if (fast := getattr(part, "backend_tokenizer", None)) is not None:
            fast.no_padding()
            fast.no_truncation()


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


NEEDS = (
    "> Load it with [dmquant](https://pypi.org/project/dmquant/): `pip install dmquant`, then `import dmquant` first."
)
"""The first line of a card, for those whose diffusers does not know the quantization type."""


def model_card(
    name: str, recipe: str, weights: str, activations: str, pipeline: str, dtype: torch.dtype, loras: Sequence[str] = ()
) -> str:
    """README.md of a quantized pipeline: what it is, the LoRAs fused into it, and the lines that load it."""
    import diffusers

    makes_videos = hasattr(diffusers, pipeline) and FRAMES in call_parameters(pipeline)
    return f"""---
library_name: diffusers
tags: [dmquant, quantized, {"text-to-video" if makes_videos else "text-to-image"}]
---

{NEEDS}

# {cell(name)}, weights in {weights}, activations in {activations}

A diffusers `{pipeline}` whose backbone dmquant quantized with the recipe {code(recipe)}. Scales and layers are in
`config.json` of the backbone, codes in its safetensors.
{fused_loras(loras)}
```python
import dmquant  # registers the quantizer with diffusers
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype={dtype})
```
"""


def fused_loras(loras: Sequence[str]) -> str:
    """The paragraph of a card on LoRAs, each described in a line; nothing where there are none."""
    return f"\nFused into it before quantizing: {'; '.join(map(cell, loras))}.\n" if loras else ""
