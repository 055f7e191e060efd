"""The attention implementation that the environment asks diffusers for."""

import os

from torch import nn

from dmquant.errors import UserError

VARIABLE = "DIFFUSERS_ATTN_BACKEND"


def check_attention(backbone: nn.Module) -> None:
    """UserError where DIFFUSERS_ATTN_BACKEND names a backend that is not installed.

    diffusers looks only once it is asked for, or else calls what is not there, in the middle of the first image.
    """
    chosen = os.environ.get(VARIABLE)
    processors = (getattr(module, "processor", None) for module in backbone.modules())
    if chosen is None or not any(hasattr(processor, "_attention_backend") for processor in processors):
        return
    try:
        backbone.set_attention_backend(chosen)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{VARIABLE}={chosen}: {reason} Or unset {VARIABLE}") from error
