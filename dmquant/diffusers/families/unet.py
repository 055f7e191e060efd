"""The UNets of Stable Diffusion 1.x, 2.x and XL: resnets, transformers and samplers on the way down and up again.

Between the blocks flows the feature map; on the way down each resnet and sampler also leaves its output for the resnet
at the same depth on the way up, which meets it concatenated behind the stream. Every resnet reads the timestep's
embedding (SDXL: with size and pooled text added), every transformer the text embeddings.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import IMAGED, Family, imaged

if TYPE_CHECKING:
    from torch import nn

_BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")


def _blocks(unet: "nn.Module") -> list[str]:
    """A transformer of several blocks (SDXL has ten in a row) is cut into these, or one unit would take 20 GB."""
    names = []
    for name, module in unet.named_modules():
        if type(module).__name__ not in _BLOCKS:
            continue
        inner = getattr(module, "transformer_blocks", ())
        names += [f"{name}.transformer_blocks.{index}" for index in range(len(inner))] if len(inner) > 1 else [name]
    return names


def _concatenations(unet: "nn.Module") -> dict[str, int]:
    """The shortcut of every resnet on the way up: its stream comes from the resnet before it."""
    lowest = unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block
    stream, found = lowest.resnets[-1].out_channels, {}
    for level, block in enumerate(unet.up_blocks):
        for index, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None:
                found[f"up_blocks.{level}.resnets.{index}.conv_shortcut"] = stream
            stream = resnet.out_channels
    return found


FAMILY = Family(
    name="unet",
    component="unet",
    backbones=("UNet2DConditionModel",),
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    imaged=imaged("StableDiffusionPipeline", *IMAGED.values()) | imaged("StableDiffusionXLPipeline", *IMAGED.values()),
    keep={
        "conv_in": "sees the noisy latents themselves; 4 input channels",
        "time_embedding.*": "one embedding conditions every resnet: its error reaches every pixel",
        "add_embedding.*": "SDXL adds size and pooled text to the timestep embedding",
        "conv_out": "its error goes straight into the predicted noise",
    },
    blocks=_blocks,
    concatenations=_concatenations,
    may_lack={"StableDiffusionXLPipeline": ("text_encoder", "tokenizer")},
    # A picture that the checker blanks would count as an error of the quantized model, or hide one.
    without={"safety_checker": None, "requires_safety_checker": False},
)
