"""The dtype in which this machine multiplies an input's values soonest, all of them kept; measured once a machine."""

import functools

import torch
import torch.nn.functional as F

from dmquant.cpu.measured import best_times, ratio

FASTER = 0.95  # of the time in the input's own dtype: float32 for less gain is not worth other results
SHAPE = (128, 1024, 1024)  # tokens, inputs, outputs: milliseconds, and long enough for each dtype's own pace
_NARROW = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for an input of bfloat16 or float16 where products take less time in it here, or else `dtype` itself.

    Every value of the two is one of float32 as well. The other way round digits would be lost: float32 stays float32.
    """
    return torch.float32 if dtype in _NARROW and _ratio(dtype) < FASTER else dtype


@functools.cache
def _ratio(dtype: torch.dtype) -> float:
    """The time of a product in float32 over its time in `dtype`."""
    return ratio(f"float32 / {dtype}", lambda: measured(dtype))


def measured(dtype: torch.dtype) -> float:
    """The time of a product in float32 over its time in `dtype`, by the best of interleaved turns."""
    taken = best_times({str(kind): product_in(kind) for kind in (torch.float32, dtype)})
    return taken["torch.float32"] / taken[str(dtype)]


def product_in(dtype: torch.dtype):
    """A call that multiplies matrices of SHAPE in a dtype."""
    tokens, inputs, outputs = SHAPE
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=draw, dtype=torch.float32, device="cpu")
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float32, device="cpu")
    return functools.partial(F.linear, x.to(dtype), weight.to(dtype))
