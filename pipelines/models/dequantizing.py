"""Models that are quantized already as the full precision that a run starts from: the weights that theirs stand for."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmquant.errors import UserError
from dmquant.exchange.applying import decode_, places
from dmquant.pipelines.models.opening import is_of_others, open_foreign
from dmquant.pipelines.models.skeleton import skeleton

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def decoded(part: Path, dtype: torch.dtype) -> nn.Module | None:
    """The model in the folder `part` with its weights decoded, in `dtype` and eval mode, if an engine's format is read.

    None where that is none of them: what diffusers can load, it may be able to dequantize. UserError for a file that
    is damaged, lacks tensors or is of another model.
    """
    if not is_of_others(part):
        return None
    foreign, model = open_foreign(part), skeleton(part, on="cpu").to(dtype)
    name = type(model).__name__
    decode_(foreign, places(foreign, model, name), model, name)
    return model.requires_grad_(False).eval()


def dequantize_parts(pipeline: "DiffusionPipeline", dtype: torch.dtype) -> None:
    """Dequantize, in place, every part of a pipeline that was loaded quantized, whoever quantized it, to `dtype`."""
    for name, part in pipeline.components.items():
        if getattr(part, "hf_quantizer", None) is None:
            continue
        try:
            part.dequantize()
        except Exception as error:  # what other quantizers raise, and NotImplementedError where they cannot
            method = part.hf_quantizer.quantization_config.quant_method
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the {name} is quantized by {getattr(method, 'value', method)}, which cannot be undone: {reason}"
            ) from error
        part.to(dtype)
