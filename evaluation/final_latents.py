"""The final latents of generated images: what the sampler hands to the VAE, kept beside each image as float32.

They show what quantization did before the VAE and 8-bit pixels blur it.
"""

from pathlib import Path

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.host.files import remembering
from dmquant.host.sealed import load_sealed, save_sealed, sealed_about

SUFFIX = ".latent.safetensors"
TENSOR = "latent"


def latent_path(image: Path) -> Path:
    """The path of the final latents of the image at `image`: `00042.latent.safetensors` beside `00042.png`."""
    return image.with_suffix(SUFFIX)


def save_latent(latent: Tensor, image: Path, key: str) -> None:
    """Write the latents of one image beside it, whole or not at all; `key` is the image's own.

    `latent` is float32 of any shape, in the units of the sampler; strides are not kept. Raises UserError where the disk
    refuses.
    """
    save_sealed(latent_path(image), {TENSOR: latent.clone(memory_format=torch.contiguous_format)}, key)


def read_latent(image: Path, key: str | None) -> Tensor | None:
    """The final latents made together with the image of that key; None where there are none, or a damaged file.

    They are float32 on the CPU, in the shape and the units they were saved in.
    """
    tensors, of_image = load_sealed(latent_path(image)) or ({}, None)
    return tensors.get(TENSOR) if of_image == key else None


def has_latent(image: Path, key: str) -> bool:
    """Whether `read_latent` would give any; a file that has not changed is not read again."""
    try:
        return _key(latent_path(image)) == key
    except UserError:
        return False


@remembering
def _key(path: Path) -> str | None:
    """The key in a file of latents that is what was written."""
    return sealed_about(path)
