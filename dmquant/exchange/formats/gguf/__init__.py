"""GGUF, which ComfyUI-GGUF, stable-diffusion.cpp and diffusers read."""

from dmquant.exchange.formats.gguf.blocks import WRITTEN
from dmquant.exchange.formats.gguf.exporting import export, refuses, weighs_errors
from dmquant.exchange.formats.gguf.reading import open_gguf, recognises
from dmquant.exchange.interfaces import ForeignFormat

FORMAT = ForeignFormat(
    name="gguf",
    title="GGUF (ComfyUI-GGUF, stable-diffusion.cpp, diffusers)",
    recognises=recognises,
    read=lambda found: open_gguf(FORMAT, found),
    export=export,
    suffix=".gguf",
    variants=tuple(WRITTEN),
    weighs_errors=weighs_errors,
    refuses=refuses,
)
