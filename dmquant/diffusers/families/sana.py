"""Sana: one list of transformer blocks with linear attention and a convolutional feed-forward, on few large patches.

Between the blocks flow the image tokens alone, which the feed-forward folds into a feature map and back; every block
also reads the caption's embeddings with their mask and one modulation that `time_embed` makes of the timestep.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family, blocks_in, first_of_each_patch, imaged

if TYPE_CHECKING:
    from torch import Tensor, nn


def _counted(transformer: "nn.Module") -> "dict[str, Tensor]":
    config = transformer.config
    features = transformer.proj_out.out_features
    return {"proj_out": first_of_each_patch(features, config.out_channels, config.in_channels)}


FAMILY = Family(
    name="sana",
    component="transformer",
    backbones=("SanaTransformer2DModel",),
    pipelines=("SanaPipeline",),
    imaged=imaged("SanaPipeline", "ControlNet"),
    keep={
        "patch_embed.*": "sees the noisy latents themselves; 72 thousand of Sana's 1.6 billion weights",
        "time_embed.*": "one embedding sets scale and shift of every block: its error reaches all tokens",
        "caption_projection.*": "runs once a prompt, and every cross-attention reads its output",
        "transformer_blocks.*.ff.conv_depth": "depthwise: nine weights a channel, no inputs to share a scale; 0.1 %",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    counted=_counted,
)
