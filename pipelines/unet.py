"""The UNets of Stable Diffusion 1.x, 2.x and XL."""

from dmquant.pipelines.registry import Family

FAMILY = Family(
    name="unet",
    component="unet",
    backbones=("UNet2DConditionModel",),
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    keep=(
        "conv_in",  # sees the noisy latents themselves; 4 input channels
        "time_embedding.*",  # one embedding conditions every resnet: its error reaches every pixel
        "add_embedding.*",  # SDXL adds size and pooled text to the timestep embedding
        "conv_out",  # its error goes straight into the predicted noise
    ),
    blocks=("down_blocks", "mid_block", "up_blocks"),
    # A picture that the checker blanks would count as an error of the quantized model, or hide one.
    without={"safety_checker": None, "requires_safety_checker": False},
)
