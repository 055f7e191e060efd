"""The prediction of noise, velocity or image that a backbone returns, as its sampler reads it."""

import dataclasses
from typing import Any

from torch import Tensor

from dmquant.calib.blocks.replay import Arguments
from dmquant.calib.data.tree import flatten
from dmquant.errors import UserError

INSTEAD = "learn without it, by learning.objective: mse"


def prediction_of(returned: Any, arguments: Arguments) -> Tensor:
    """The prediction in what a backbone returned: a tensor, or a tuple or dataclass that begins with one.

    Of channels (dimension 1) behind those of the latents among its `arguments`, which hold a variance that no sampler
    of today reads, it has none. Raises UserError where there is no such tensor.
    """
    first = returned
    if dataclasses.is_dataclass(returned):
        first = getattr(returned, dataclasses.fields(returned)[0].name)
    elif isinstance(returned, tuple | list) and returned:
        first = returned[0]
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim < 2:
        raise UserError(f"the backbone returns no prediction but {type(first).__name__}: {INSTEAD}")
    for _, latents in flatten(arguments)[1]:
        if latents.ndim == first.ndim > 2 and latents.shape[2:] == first.shape[2:]:
            return first[:, : latents.shape[1]]
    return first
