"""Any backbone that diffusers loads: its Linear and Conv2d layers are quantized without data.

Nothing is known of its blocks, so nothing can be calibrated; layers are kept by what diffusers usually calls those that
read latents, timestep or text, or that write the output, and the first and the last layer whatever they are called.
"""

from dmquant.diffusers.families import GENERIC, Family
from dmquant.models import USUAL

COMPONENTS = ("transformer", "unet")

FAMILY = Family(
    name=GENERIC,
    component=COMPONENTS[0],
    backbones=(),
    pipelines=(),
    keep=USUAL,
    keeps_ends=True,
    blocks=lambda backbone: [],
)
