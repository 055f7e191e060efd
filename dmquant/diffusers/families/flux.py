"""Flux.1: a list of joint blocks, which run image and text side by side, then a list of blocks on both as one sequence.

Between the blocks flow image tokens and text tokens. Every block also reads one vector made of timestep, pooled text
and (dev) the guidance scale, from which its own norms make scales, shifts and gates, and the rotary table of all
positions. Those norms are a quarter of all weights, so they are not kept: their error stays within the block, and
learned rounding of the block makes up for it. Guidance is distilled: there is no second row without the prompt.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import IMAGED, Family, blocks_in, imaged, joint_in

if TYPE_CHECKING:
    from torch import nn


def _concatenations(transformer: "nn.Module") -> dict[str, int]:
    """No skips, but `proj_out` of a single block reads attention's output and the MLP's, side by side."""
    return {
        f"single_transformer_blocks.{index}.proj_out": block.proj_out.out_features
        for index, block in enumerate(transformer.single_transformer_blocks)
    }


FAMILY = Family(
    name="flux",
    component="transformer",
    backbones=("FluxTransformer2DModel",),
    pipelines=("FluxPipeline",),
    imaged=imaged("FluxPipeline", *IMAGED.values()),
    edits=("FluxKontextPipeline",),
    keep={
        "x_embedder": "sees the noisy latents themselves; 0.2 million of Flux.1's 12 billion weights",
        "time_text_embed.*": "one embedding of timestep, guidance and pooled text conditions every block",
        "context_embedder": "runs on every text token before the first block; all blocks read what it makes",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks", "single_transformer_blocks"),
    guidance="embedded",
    concatenations=_concatenations,
    joint=joint_in(
        {
            "transformer_blocks": (
                "attn.to_q attn.to_k attn.to_v",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            ),
            "single_transformer_blocks": ("attn.to_q attn.to_k attn.to_v proj_mlp",),
        }
    ),
    shared=("img_ids", "txt_ids"),
)
