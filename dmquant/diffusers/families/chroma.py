"""Chroma: Flux.1 without modulation in its blocks; one network makes scales, shifts and gates for all of them.

Between the blocks flow image tokens and text tokens, first side by side, then as one sequence. That network reads
timestep and the number of the vector that it is to make, 3 for each single block, 12 for each joint one. Its weights
are 3 % of all, and its error is in every block, so it is kept. There is no guidance input: guidance takes a second call
at every step, for the negative prompt.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family, blocks_in, imaged, joint_in

if TYPE_CHECKING:
    from torch import nn


def _concatenations(transformer: "nn.Module") -> dict[str, int]:
    """No skips, but `proj_out` of a single block reads attention's output and the MLP's, side by side."""
    return {
        f"single_transformer_blocks.{index}.proj_out": block.proj_out.out_features
        for index, block in enumerate(transformer.single_transformer_blocks)
    }


FAMILY = Family(
    name="chroma",
    component="transformer",
    backbones=("ChromaTransformer2DModel",),
    pipelines=("ChromaPipeline",),
    imaged=imaged(
        "ChromaPipeline", "Img2Img"
    ),  # diffusers 0.42's ChromaInpaintPipeline reads a setting that is not there
    keep={
        "x_embedder": "sees the noisy latents themselves; 0.2 million of Chroma's 8.9 billion weights",
        "context_embedder": "runs on every text token before the first block; all blocks read what it makes",
        "distilled_guidance_layer.*": "makes scales, shifts and gates of every block from the timestep",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks", "single_transformer_blocks"),
    guidance="calls",
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
