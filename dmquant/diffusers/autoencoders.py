"""The layers of diffusers' autoencoders that stay in high precision by default."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_KEEP = {
    "*conv_in": "sees the image or the latents themselves",
    "*conv_out": "its error goes straight into the image or the latents",
    "quant_conv": "its error goes straight into the latents",
    "post_quant_conv": "sees the latents themselves",
}


def kept_of(model: "nn.Module") -> Mapping[str, str] | None:
    """Globs of the layers that stay, and why, for a model whose class is one of diffusers' autoencoders; else None."""
    if not type(model).__name__.startswith(("Autoencoder", "AsymmetricAutoencoder")):
        return None
    blocks = getattr(getattr(model, "decoder", None), "up_blocks", ())
    last = (
        {f"decoder.up_blocks.{len(blocks) - 1}.*": "works on the pixels, and has few of the weights"} if blocks else {}
    )
    return _KEEP | last
