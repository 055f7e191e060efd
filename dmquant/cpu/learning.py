"""Learned roundings on a CPU: what is no matrix product of a step, in one compiled pass over the weights each.

The results are those of the eager code but for the last digits of the exponential and the power.
"""

import ctypes

import torch
from torch import Tensor

from dmquant.cpu.compiling import library
from dmquant.cpu.solving import passed, threads_for


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled code is there and takes these: float32 in one piece, on the CPU; None stands for none."""
    given = [tensor for tensor in tensors if tensor is not None]
    fit = (each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous() for each in given)
    return all(fit) and library("learn") is not None


def soft_weights(v: Tensor, step: Tensor | None, lower: Tensor, upper: Tensor, gate: tuple[float, float]) -> Tensor:
    """lower + h(v / step) (upper - lower), same shape. `gate`: what h stretches a sigmoid by, and adds."""
    soft = torch.empty_like(lower)
    _call("soft_weights", v, gate, v, step, lower, upper, soft)
    return soft


def soft_gradient(
    v: Tensor, step: Tensor | None, lower: Tensor, upper: Tensor, gate: tuple[float, float], gradient: Tensor
) -> Tensor:
    """The gradient by `v` of `soft_weights`, from the one by those weights; same shape."""
    by_v = torch.empty_like(lower)
    _call("soft_gradient", v, gate, v, step, lower, upper, gradient.contiguous(), by_v)
    return by_v


def add_penalty_gradient_(
    gradient: Tensor, v: Tensor, step: Tensor | None, gate: tuple[float, float], beta: float, factor: float
) -> None:
    """Add to the gradient by `v` that of factor * sum(1 - |2 h(v / step) - 1|^beta)."""
    _call("penalty_gradient", v, gate, v, step, beta, factor, gradient)


def _call(name: str, v: Tensor, gate: tuple[float, float], *arguments: Tensor | float | None) -> None:
    threads = threads_for(v.numel())
    getattr(library("learn"), name)(threads, ctypes.c_int64(v.numel()), *map(passed, (*gate, *arguments)))
