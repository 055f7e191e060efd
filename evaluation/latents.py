"""The final latents of generated images: what the sampler hands to the VAE, kept beside each image as float32.

They show what quantization did before the VAE and 8-bit pixels blur it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmquant.files import replacing

SUFFIX = ".latent.safetensors"
TENSOR = "latent"


def latent_path(image: Path) -> Path:
    """Where the final latents of the image at `image` are: `00042.latent.safetensors` beside `00042.png`."""
    return image.with_suffix(SUFFIX)


def save_latent(latent: Tensor, image: Path, key: str) -> None:
    """Write the latents of one image beside it, whole or not at all; `key` is the image's own."""
    with replacing(latent_path(image)) as partial:
        save_file({TENSOR: latent.clone(memory_format=torch.contiguous_format)}, partial, metadata={"key": key})


def read_latent(image: Path, key: str | None) -> Tensor | None:
    """The final latents, float32, made together with the image of that key; None where there are none, or damaged."""
    try:
        with safe_open(latent_path(image), framework="pt") as file:
            return file.get_tensor(TENSOR) if file.metadata() == {"key": key} else None
    except (OSError, SafetensorError):
        return None


@contextlib.contextmanager
def recording_latents(pipeline: Any) -> Iterator[list[Tensor]]:
    """Collect what the pipeline's sampler hands to its VAE while the block runs: float32 [images, ...] a call.

    Pipelines divide the latents by the VAE's scaling factor, and some shift them, just before they decode. The factor
    is undone here; a shift stays, and cancels where latents are subtracted. A pipeline without a VAE gives nothing.
    """
    taken: list[Tensor] = []
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield taken
        return
    decode, own = vae.decode, vars(vae).get("decode")
    factor = getattr(vae.config, "scaling_factor", None) or 1.0

    def recording(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(latents.float().cpu() * factor)
        return decode(latents, *args, **kwargs)

    vae.decode = recording
    try:
        yield taken
    finally:
        del vae.decode
        if own is not None:
            vae.decode = own
