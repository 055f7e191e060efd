"""AuraFlow: a list of joint blocks, which run image and text side by side, then a list of blocks on both in one."""

from dmquant.diffusers.families import Family, blocks_in

FAMILY = Family(
    name="auraflow",
    component="transformer",
    backbones=("AuraFlowTransformer2DModel",),
    pipelines=("AuraFlowPipeline",),
    keep={
        "pos_embed.*": "sees the noisy latents themselves",
        "time_step_proj.*": "one embedding of the timestep conditions every block",
        "context_embedder": "runs on every text token before the first block",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("joint_transformer_blocks", "single_transformer_blocks"),
)
