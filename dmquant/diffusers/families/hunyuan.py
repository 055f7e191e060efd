"""HunyuanDiT 1.1 and 1.2: one list of transformer blocks, those of its second half with long skips from the first.

Between the blocks flow the image tokens; block `i` past the middle also reads the output of the block as far before the
middle, concatenated behind the stream in front of `skip_linear`. Every block reads the embeddings of two text encoders
in one sequence, one vector made of timestep and pooled text (1.1: with image size and style), which its own `norm1`
turns into a shift, and the rotary table of the image's positions.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family, blocks_in, first_of_each_patch, imaged

if TYPE_CHECKING:
    from torch import Tensor, nn


def _concatenations(transformer: "nn.Module") -> dict[str, int]:
    return {
        f"blocks.{index}.skip_linear": block.skip_linear.out_features
        for index, block in enumerate(transformer.blocks)
        if block.skip_linear is not None
    }


def _counted(transformer: "nn.Module") -> "dict[str, Tensor]":
    features = transformer.proj_out.out_features
    return {"proj_out": first_of_each_patch(features, transformer.out_channels, transformer.config.in_channels)}


FAMILY = Family(
    name="hunyuan",
    component="transformer",
    backbones=("HunyuanDiT2DModel",),
    pipelines=("HunyuanDiTPipeline",),
    imaged=imaged("HunyuanDiTPipeline", "ControlNet"),
    keep={
        "pos_embed.*": "sees the noisy latents themselves; 23 thousand of HunyuanDiT's 1.5 billion weights",
        "time_extra_emb.*": "one embedding of timestep, pooled text, size and style conditions every block",
        "text_embedder.*": "every cross-attention reads its output",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("blocks"),
    concatenations=_concatenations,
    counted=_counted,
    shared=("image_rotary_emb",),
    token_limits={"tokenizer": 77, "tokenizer_2": 256},
)
