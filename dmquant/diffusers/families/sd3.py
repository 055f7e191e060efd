"""Stable Diffusion 3 and 3.5: one list of joint transformer blocks, which run image and text side by side.

Between the blocks flow two streams, image tokens and text tokens, which meet in every block's attention; the last block
returns the image's alone. Every block also reads one vector made of timestep and pooled text, from which its own
`norm1` and `norm1_context` make scales, shifts and gates. These are a third of all weights, so they are not kept: their
error stays within the block, and learned rounding of the block makes up for it.
"""

from dmquant.diffusers.families import Family, blocks_in, imaged, joint_in

FAMILY = Family(
    name="sd3",
    component="transformer",
    backbones=("SD3Transformer2DModel",),
    pipelines=("StableDiffusion3Pipeline",),
    imaged=imaged("StableDiffusion3Pipeline", "Img2Img", "Inpaint", "ControlNet"),
    keep={
        "pos_embed.*": "sees the noisy latents themselves; 98 thousand of SD3's 2 billion weights",
        "time_text_embed.*": "one embedding of timestep and pooled text conditions every block",
        "context_embedder": "runs on every text token before the first block; all blocks read what it makes",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    joint=joint_in(
        {
            "transformer_blocks": (
                "attn.to_q attn.to_k attn.to_v",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "attn2.to_q attn2.to_k attn2.to_v",
            )
        }
    ),
    may_lack={"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")},
)
