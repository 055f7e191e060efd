"""PixArt-alpha and PixArt-Sigma: one list of transformer blocks between patch embedding and projection.

Between the blocks flow the image tokens alone; every block also reads the caption's embeddings with their mask and one
modulation that `adaln_single` makes of the timestep (for PixArt-alpha at 1024 pixels also of size and aspect ratio).
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family, blocks_in, first_of_each_patch

if TYPE_CHECKING:
    from torch import Tensor, nn


def _counted(transformer: "nn.Module") -> "dict[str, Tensor]":
    config = transformer.config
    features = transformer.proj_out.out_features
    return {"proj_out": first_of_each_patch(features, config.out_channels, config.in_channels)}


FAMILY = Family(
    name="pixart",
    component="transformer",
    backbones=("PixArtTransformer2DModel",),
    pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    keep={
        "pos_embed.*": "sees the noisy latents themselves; 18 thousand of PixArt-Sigma's 611 million weights",
        "adaln_single.*": "one embedding sets scale and shift of every block: its error reaches all tokens",
        "caption_projection.*": "runs once a prompt, and every cross-attention reads its output",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    counted=_counted,
)
