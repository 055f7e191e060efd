"""Safetensors files sealed with a hash of their content: one that is not what was written is as good as absent."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmquant.host.files import replacing

SEAL = "sha256"


def save_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any shape and dtype to `path`, whole or not at all; strides are not kept.

    Raises UserError where the disk refuses.
    """
    dense = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(dense, partial, metadata={**metadata, SEAL: _digest(dense, metadata)})


def load_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors, on the CPU, and metadata of a file; None where there is none, or one that is not what was written.

    Files of versions up to 0.2 have no seal, and are taken as they are.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError):
        return None
    seal = metadata.pop(SEAL, None)
    return None if seal not in (None, _digest(tensors, metadata)) else (tensors, metadata)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
