"""The formats of layers in ComfyUI's files, by name."""

import torch

from dmquant.exchange.formats.comfyui.floating import Float8, Mxfp8, Nvfp4
from dmquant.exchange.formats.comfyui.integer import Int8, SvdQuant
from dmquant.exchange.formats.comfyui.layout import Layout
from dmquant.exchange.formats.comfyui.rotated import Levels
from dmquant.qtensor import WeightSpec

_ALL = (
    Nvfp4(),
    Mxfp8(),
    Float8("float8_e4m3fn", "fp8_e4m3", torch.float8_e4m3fn),
    Float8("float8_e5m2", "fp8_e5m2", torch.float8_e5m2),
    Int8(),
    SvdQuant(),
    Levels(),
)
LAYOUTS = {layout.name: layout for layout in _ALL}


def layout_of(spec: WeightSpec) -> Layout | None:
    """The format that weights of this specification are in; None for none."""
    return next((layout for layout in _ALL if layout.holds(spec)), None)
