"""Wan 2.1 and 2.2, text to video: one list of transformer blocks on the tokens of all frames.

Between the blocks flow the tokens of the video, which attend to one another and then to the text, padded with zeros to
one length. Every block also reads six vectors of the timestep, to which it adds a table of its own: one embedding makes
scales, shifts and gates of all blocks, and it is a hundredth of the weights. Embedders of time, tables and norms
compute in float32, by the class. Latents are cut into patches by a Conv3d, which is never quantized. Guidance takes a
second call at every step.

Wan 2.2 of 14 billion parameters has two experts: `transformer` computes the timesteps above a boundary, `transformer_2`
those below. Both are quantized, and each is calibrated on the timesteps that it computes. The 5 billion model has one,
and is given a timestep for every token.
"""

from dmquant.diffusers.families import Family, blocks_in, joint_in

FAMILY = Family(
    name="wan",
    component="transformer",
    backbones=("WanTransformer3DModel",),
    pipelines=("WanPipeline",),
    keep={
        "condition_embedder.time_embedder.*": "one embedding of the timestep conditions every block, in float32",
        "condition_embedder.time_proj": "sets scale, shift and gate of all blocks: its error adds up",
        "condition_embedder.text_embedder.*": "runs once a prompt, and every cross-attention reads its output",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("blocks"),
    guidance="calls",
    experts=("transformer_2",),
    joint=joint_in({"blocks": ("attn1.to_q attn1.to_k attn1.to_v", "attn2.to_k attn2.to_v")}),
)
