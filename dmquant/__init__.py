"""Low-bit floating-point quantization for text-to-image diffusion pipelines.

Importing dmquant also registers its quantizer, by which diffusers loads the folders that dmquant saves.
"""

import importlib

from dmquant.diffusers import registering

__version__ = "0.2.0"

_HOME = {
    "get_format": "dmquant.formats",
    "quantize_tensor": "dmquant.qtensor",
    "quantize_": "dmquant.convert",
    "quantize_pipeline": "dmquant.pipelines.api",
    "Recipe": "dmquant.recipe",
    "QuantConfig": "dmquant.diffusers.quantizer",
    "load_pipeline": "dmquant.pipelines.models.loading",
    "deterministic": "dmquant.diffusers.deterministic",
    "save_pipeline": "dmquant.diffusers.saving",
    "requantizing": "dmquant.diffusers.fusing",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import torch only when something that needs it is asked for, so that `dmquant --help` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'dmquant' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


registering.install()
