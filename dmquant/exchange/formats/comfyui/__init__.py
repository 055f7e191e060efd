"""ComfyUI's files: `comfy_quant` layers in formats of comfy-kitchen, side by side in one file.

Sources: comfy-kitchen 0.2.40 (tensor/*.py and its eager backend, which the tests run), ComfyUI's comfy/ops.py,
comfy/quant_ops.py and comfy/model_detection.py, as of November 2026.
"""

from dmquant.exchange.formats.comfyui import reading
from dmquant.exchange.formats.comfyui.writing import export, refuses, refuses_in
from dmquant.exchange.interfaces import Foreign, ForeignFormat, Found


def _read(found: Found) -> Foreign:
    return reading.read(found, FORMAT)


FORMAT = ForeignFormat("comfyui", "ComfyUI", reading.recognises, _read, export, refuses=refuses, refuses_in=refuses_in)
