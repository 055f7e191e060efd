"""The patches of a convolution as rows of a matrix."""

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn


def mixes_tokens(layer: nn.Module) -> bool:
    """Whether an output of the layer sums over several tokens of its input, or over padding."""
    if not isinstance(layer, nn.Conv2d):
        return False
    return prod((*layer.kernel_size, *layer.stride)) > 1 or any(layer._reversed_padding_repeated_twice)


def patches(pixels: Tensor, layer: nn.Conv2d) -> tuple[Tensor, tuple[int, int, int]]:
    """The inputs of every output pixel, (batch * height * width, positions * channels), and those three numbers.

    `pixels` (batch, height, width, channels), one byte each, where zero bytes are zeros; columns run as those of
    `to_matrix` do, over the positions of the kernel and, within each, over the channels.
    """
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if any((left, right, top, bottom)):
        pixels = F.pad(pixels, (0, 0, left, right, top, bottom))
    steps = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(steps, 1):
        pixels = pixels.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    batch, height, width = pixels.shape[:3]  # and channels, rows and columns of the kernel
    return pixels.permute(0, 1, 2, 4, 5, 3).reshape(batch * height * width, -1), (batch, height, width)
