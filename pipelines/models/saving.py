"""Write a quantized pipeline as a folder that works anywhere: whole or not at all."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmquant.diffusers.quantizer import save_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTIAL = ".part"
NARROW = (torch.float16, torch.bfloat16)


def save_whole(pipeline: "DiffusionPipeline", folder: Path, card: str) -> None:
    """Save `pipeline` with its model card to `folder`; what is there is replaced in one step at the end."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_pipeline(pipeline, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


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
