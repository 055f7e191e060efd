"""Any backbone that diffusers loads: its Linear and Conv2d layers are quantized without data.

Nothing is known of its blocks, so nothing can be calibrated; layers are kept by what diffusers usually calls those that
read latents, timestep or text, or that write the output, and the first and the last layer whatever they are called.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family

if TYPE_CHECKING:
    from torch import nn

GENERIC = "generic"
COMPONENTS = ("transformer", "unet")


def ends(backbone: "nn.Module") -> dict[str, str]:
    """The first and the last Linear or Conv2d in the order of the backbone's definition, and why they are kept."""
    from torch import nn

    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return {layers[0]: "the first layer", layers[-1]: "the last layer"} if layers else {}


FAMILY = Family(
    name=GENERIC,
    component=COMPONENTS[0],
    backbones=(),
    pipelines=(),
    keep={
        "conv_in": "sees the noisy latents themselves",
        "*embed*": "embeds latents, timestep, text or size for the whole network",
        "time_extra_emb.*": "conditions every block",
        "adaln_single.*": "one embedding sets scale and shift of every block",
        "caption_projection.*": "every cross-attention reads its output",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
        "proj_out_[0-9]": "its error goes straight into the predicted noise",
        "conv_out": "its error goes straight into the predicted noise",
    },
    blocks=lambda backbone: [],
)
