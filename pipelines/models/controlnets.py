"""ControlNets: found in a folder or on the Hub, checked by their configuration, loaded once."""

import functools
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmquant.errors import UsageError, UserError
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.hashes import sha256_once
from dmquant.host.text import file_name
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.hub import CONFIG
from dmquant.pipelines.models.loading import explained
from dmquant.pipelines.models.registry import HUB_ID, pipeline_class
from dmquant.pipelines.models.weights import weight_files
from dmquant.pipelines.models.whole import check_model


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet by its source, a folder or a Hub id, and the folder of its files."""

    source: str
    folder: Path
    kind: str
    """Class name."""

    @classmethod
    def find(cls, source: str, pipeline: str) -> "ControlNet":
        """One for a pipeline of that class; what is not at hand is downloaded, and said to be.

        Raises UserError for a folder of something else and a ControlNet of another kind.
        """
        path = Path(os.path.expanduser(source))
        if os.path.exists(path):
            folder = path.resolve()
        elif HUB_ID.fullmatch(source):
            folder = hub.part(source, Console().say)
        else:
            raise UsageError(f"--controlnet {source}: there is no such folder, and it is no id on the Hub")
        if not (folder / CONFIG).is_file():
            raise UserError(f"--controlnet {source} is no ControlNet: it has no {CONFIG}")
        kind = str(folders.read_json(folder / CONFIG).get("_class_name"))
        wanted = inspect.signature(pipeline_class(pipeline).__init__).parameters["controlnet"].annotation
        if not re.search(rf"\b{re.escape(kind)}\b", str(wanted)):
            raise UserError(f"--controlnet {source} is a {kind}, which a {pipeline} does not take")
        if not weight_files(folder):
            raise UserError(f"--controlnet {source} has no weights in safetensors files")
        check_model(folder, "diffusers", kind, folders.variant(folder.parent, folder.name))
        return cls(source, folder, kind)

    @property
    def sha256(self) -> str:
        """Fingerprint of its files."""
        files = [self.folder / CONFIG, *weight_files(self.folder)]
        return fingerprint(files={path.name: sha256_once(path) for path in files})

    def load(self, dtype: torch.dtype, device: str) -> Any:
        """The network on the device; the same one whenever it is asked for."""
        return _loaded(self, dtype, device)

    def describe(self) -> dict[str, str]:
        """What run.yaml says of it."""
        is_folder = os.path.exists(os.path.expanduser(self.source))
        source = file_name(self.source) if is_folder else self.source
        return {"source": source, "class": self.kind, "sha256": self.sha256}


@functools.lru_cache(maxsize=1)
def _loaded(controlnet: ControlNet, dtype: torch.dtype, device: str) -> Any:
    import diffusers

    with explained(controlnet.folder):
        net = getattr(diffusers, controlnet.kind).from_pretrained(
            controlnet.folder,
            dtype=dtype,
            variant=folders.variant(controlnet.folder.parent, controlnet.folder.name),
            use_safetensors=True,
            local_files_only=True,
        )
    return net.eval().to(device)
