"""PixArt-alpha and PixArt-Sigma: one list of transformer blocks between patch embedding and projection."""

from dmquant.pipelines.registry import Family

FAMILY = Family(
    name="pixart",
    component="transformer",
    backbones=("PixArtTransformer2DModel",),
    pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    keep=(
        "pos_embed.*",  # sees the noisy latents themselves; 18 thousand of 611 million weights
        "adaln_single.*",  # one timestep embedding sets scale and shift of every block: its error reaches all tokens
        "caption_projection.*",  # runs once a prompt, and every cross-attention reads its output
        "proj_out",  # its error goes straight into the predicted noise
    ),
    blocks=("transformer_blocks",),
)
