"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H-14 tuned on what people preferred.

The score of an image and its prompt is the cosine of their features, as the hpsv2 package returns it; its benchmark
tables print 100 times that. The package prepares an image otherwise than open_clip does: resized so that the longer
side is 224, then padded with black to a square, where open_clip crops.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmquant.errors import UserError
from dmquant.evaluation.images import load_image
from dmquant.evaluation.networks.clip import PARAMETERS, ClipModel, build
from dmquant.evaluation.networks.hub_file import HubFile
from dmquant.evaluation.result import Backbone
from dmquant.host.files import sha256

ENVIRONMENT = "DMQUANT_HPSV2"
ARCHITECTURE = "ViT-H-14"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"

SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class HPSv2(ClipModel):
    """HPSv2 of `version` 2.0 or 2.1: a CLIP model with its own weights and its own preparation of images."""

    @classmethod
    def load(cls, version: str, device: str = "cpu", say: Callable[[str], None] = lambda line: None) -> "HPSv2":
        """The model; `say` is told of a download. Raises UnavailableError where the weights cannot be had."""
        weights = find_given(version) or on_hub(version).fetch(f"weights of HPSv2 {version}", remedy(version), say)
        model, tokenizer = build(ARCHITECTURE, weights, {})
        backbone = Backbone(f"HPSv2 {version} ({ARCHITECTURE})", sha256(weights))
        return cls(model, prepare, tokenizer, backbone, "hpsv2", device)


def find_given(version: str) -> Path | None:
    """The weights in the folder that the environment variable DMQUANT_HPSV2 names; raises UserError for no folder."""
    given = os.environ.get(ENVIRONMENT)
    if not given:
        return None
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        raise UserError(f"{ENVIRONMENT} is set to {folder}, which is not a folder with {' or '.join(FILES.values())}")
    path = folder / FILES[version]
    return path if path.is_file() else None


def on_hub(version: str) -> HubFile:
    """The weights as their authors publish them."""
    return HubFile(REPOSITORY, (FILES[version],), 4 * PARAMETERS[ARCHITECTURE])


def remedy(version: str) -> str:
    """A line on getting the weights without a network."""
    return f"set {ENVIRONMENT} to a folder that has {FILES[version]}, or HF_HOME to a cache that holds {REPOSITORY}"


def prepare(path: Path) -> Tensor:
    """An image file as HPSv2 takes it: float32 [3, 224, 224], the whole image, padded with black to a square.

    Channels are normalized by CLIP's mean and deviation. Errors as in `images.load_image`.
    """
    image = load_image(path).float() / 255
    height, width = image.shape[1:]
    scale = SIZE / max(height, width)
    height, width = (max(1, round(side * scale)) for side in (height, width))
    image = F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    below, right = SIZE - height, SIZE - width
    image = F.pad(image, (right // 2, right - right // 2, below // 2, below - below // 2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std
