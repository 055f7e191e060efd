"""Any backbone that diffusers loads: its Linear and Conv2d layers are quantized without data.

Nothing is known of its blocks, so nothing can be calibrated; layers are kept by what diffusers usually calls those that
read latents, timestep or text, or that write the output, and the first and the last layer whatever they are called.
"""

from typing import TYPE_CHECKING

from dmquant.diffusers.families import Family
from dmquant.models import USUAL, Known

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
    keep=USUAL,
    blocks=lambda backbone: [],
)


def known_of_any(model: "nn.Module") -> Known | None:
    """What stays in high precision in a diffusers model that no family knows; None for another model."""
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    return Known({**USUAL, **ends(model)}) if ("diffusers", "ModelMixin") in bases else None
