"""CLIP models (Radford et al. 2021) by open_clip: which weights, and the features of images and prompts.

A model is named in one of these ways:

- `ViT-L-14-336:openai`: an architecture of open_clip and a tag of its weights, which come from the Hub or its cache;
- `ViT-B-32:/path/to/file.pt`: an architecture of open_clip and a weights file;
- `hf-hub:owner/name`: a repository on the Hub with open_clip_config.json;
- `/path/to/folder`: a folder with open_clip_config.json, open_clip_model.safetensors and, where the configuration
  names one, the files of a tokenizer.

Preparation and tokenizer are the model's own. Everything is computed in float32.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.errors import UsageError, UserError, unknown
from dmquant.evaluation.images import open_rgb
from dmquant.evaluation.networks.hub_file import HubFile, first_line
from dmquant.evaluation.networks.precision import float32_convolutions
from dmquant.evaluation.result import Backbone, UnavailableError
from dmquant.host.files import json_sha256, sha256

ensure_torchvision_imports()

import open_clip
from open_clip.transform import PreprocessCfg, image_transform_v2

HUB = "hf-hub:"
CONFIGURATION = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
BATCH_SIZE = 16

PARAMETERS = {
    "ViT-B-32": 151_277_313,
    "ViT-B-16": 149_620_737,
    "ViT-L-14": 427_616_513,
    "ViT-L-14-336": 427_944_193,
    "ViT-H-14": 986_109_441,
    "ViT-bigG-14": 2_539_567_105,
}
"""Numbers of parameters of the usual architectures: four bytes each are about the size of a file of weights."""

Tokenizer = Callable[..., Tensor]


@dataclass(frozen=True)
class Source:
    """A CLIP model: its name in reports, its weights, and how open_clip builds it.

    Without an `architecture` of open_clip's own, the configuration is the one beside the weights.
    """

    name: str
    weights: Path | HubFile
    architecture: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def cached(self) -> Path | None:
        """The weights file, if it is on this machine."""
        return self.weights if isinstance(self.weights, Path) else self.weights.cached()

    def fetch(self, say: Callable[[str], None]) -> Path:
        """The weights file, downloaded if need be; raises UnavailableError where it cannot be had."""
        if isinstance(self.weights, Path):
            return self.weights
        remedy = (
            f"name a folder with {CONFIGURATION} and {WEIGHTS[0]}, or MODEL:FILE, or set HF_HOME to a cache that holds "
            f"{self.weights.repo}"
        )
        return self.weights.fetch(f"weights of CLIP {self.name}", remedy, say)


def find(name: str) -> Source:
    """The model called `name`, of which nothing is loaded yet; raises UsageError for a name that means nothing."""
    if name.startswith(HUB):
        repo = name.removeprefix(HUB)
        return Source(repo, HubFile(repo, WEIGHTS, beside=(CONFIGURATION,)))
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # unlike Path.is_dir, False for a name too long to be one
        return Source(folder.resolve().name, _weights_in(folder))
    architecture, _, weights = name.partition(":")
    if architecture not in open_clip.list_models():
        hint = "give MODEL:WEIGHTS of open_clip (ViT-L-14-336:openai), hf-hub:OWNER/NAME, or a folder"
        raise unknown("CLIP model", name, open_clip.list_pretrained(as_str=True), hint)
    if os.path.isfile(os.path.expanduser(weights)):
        path = Path(os.path.expanduser(weights))
        return Source(f"{architecture} ({path.name})", path, architecture)
    return _tagged(architecture, weights)


class ClipModel:
    """A CLIP model: an `ImageNetwork` that reads prompts, too.

    `model` is open_clip's, `prepare` makes its input from an image file. Features are float32 [N, D] on the CPU, of
    length 1. `preparation` tells feature caches of models with the same weights file apart.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Path], Tensor],
        tokenizer: Tokenizer,
        backbone: Backbone,
        preparation: str,
        device: str = "cpu",
    ):
        self.model = model.eval().to(device)
        self.prepare = prepare
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.preparation = preparation
        self.device = device
        self.batch_size = BATCH_SIZE

    @classmethod
    def load(cls, name: str, device: str = "cpu", say: Callable[[str], None] = lambda line: None) -> "ClipModel":
        """The model called `name`; `say` is told of a download.

        Raises UsageError for an unknown name, UnavailableError where the weights cannot be had, UserError where a file
        holds others.
        """
        source = find(name)
        weights = source.fetch(say)
        architecture = source.architecture or f"local-dir:{weights.parent}"
        model, tokenizer = build(architecture, weights, source.options)
        transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        return cls(
            model,
            lambda path: transform(open_rgb(path)),
            tokenizer,
            Backbone(source.name, sha256(weights)),
            _preparation(open_clip.get_model_config(architecture), source.options, model.visual.preprocess_cfg),
            device,
        )

    def __call__(self, batch: Tensor) -> Tensor:
        """Features [N, D] of prepared images [N, 3, H, W], float32 on the CPU, of length 1."""
        return self._features(self.model.encode_image, batch)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of prompts, float32 on the CPU, of length 1; the tokenizer cuts what is too long."""
        return self._features(self.model.encode_text, self.tokenizer(list(texts)))

    def truncated(self, texts: Sequence[str]) -> int:
        """The number of `texts` that the tokenizer cuts: they would fill one place more than there is."""
        room = self.tokenizer(["", *texts], context_length=self.tokenizer.context_length + 1)[:, -1]
        return int((room[1:] != room[0]).sum())

    @torch.inference_mode()
    def _features(self, encode: Callable[..., Tensor], batch: Tensor) -> Tensor:
        with float32_convolutions():
            return encode(batch.to(self.device), normalize=True).float().cpu()


def build(architecture: str, weights: Path, options: Mapping[str, Any]) -> tuple[nn.Module, Tokenizer]:
    """An open_clip model in float32 with the weights of a file, and its tokenizer.

    `architecture` is open_clip's name of one, or `local-dir:` and the folder of the file. Raises UserError where the
    file holds something else, UnavailableError where a part of the model is on the Hub only (some text encoders are).
    """
    local = architecture.startswith("local-dir:")
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=None if local else str(weights),
            require_pretrained=True,
            pretrained_text=False,
            **options,
        )
        return model, open_clip.get_tokenizer(architecture)
    except OSError as error:
        raise UnavailableError(f"a part of {architecture} cannot be read: {first_line(error)}") from error
    except Exception as error:  # each of the three file formats has errors of its own
        raise UserError(f"{weights} does not hold the weights of {architecture}: {first_line(error)}") from error


def _tagged(architecture: str, tag: str) -> Source:
    """An architecture with weights that open_clip knows by `tag`, and what they were trained with."""
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        hint = f"those of {architecture} are {', '.join(tags) or 'none'}; or give a file"
        raise unknown(f"weights of {architecture}", tag, tags, hint)
    repo, _, file = known["hf_hub"].rpartition("/")
    size = 4 * PARAMETERS[architecture] if architecture in PARAMETERS else None
    weights = HubFile(repo, (file,) if file else WEIGHTS, size)
    # open_clip itself only warns where weights were trained with the quick GELU and the architecture has the exact one
    options = {"force_quick_gelu": known.get("quick_gelu", False), "force_preprocess_cfg": known}
    return Source(f"{architecture} ({tag})", weights, architecture, options)


def _weights_in(folder: Path) -> Path:
    if not (folder / CONFIGURATION).is_file():
        raise UsageError(f"{folder} is no CLIP model: it has no {CONFIGURATION}")
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"{folder} has no weights: it needs {WEIGHTS[0]}")
    return found


def _preparation(*what: Any) -> str:
    return "clip-" + json_sha256(what)[:8]
