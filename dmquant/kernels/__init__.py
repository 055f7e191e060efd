"""Kernels: how a quantized layer multiplies. A module of one of PLACES that has a `KERNEL` is one kernel.

The reference defines the meaning. The kernel of the least cost that takes a layer runs it, unless one is forced: by
`forced`, or by the environment variable DMQUANT_KERNEL.
"""

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmquant.errors import UsageError, check_choice
from dmquant.kernels.chosen import PREFIX, Chosen
from dmquant.kernels.reference import Reference

VARIABLE, WEIGHTS_VARIABLE = "DMQUANT_KERNEL", "DMQUANT_WEIGHTS"
KEPT = ("memory", "speed")
PLACES = (__name__, "dmquant.cpu", "dmquant.gpu")  # by name alone: the core imports no room above it
KERNELS: dict[str, Reference] = {}
_forced: str | None = None
_kept: str | None = None


def names() -> tuple[str, ...]:
    """Names of all kernels, preferred ones first."""
    return tuple(sorted(KERNELS, key=lambda name: KERNELS[name].cost))


def register(kernel: Reference) -> None:
    """Add a kernel from outside, which layers that have chosen none yet may take; UsageError for a name taken."""
    if kernel.name in KERNELS:
        raise UsageError(f"there is a kernel '{kernel.name}' already: choose another name")
    KERNELS[kernel.name] = kernel


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run every layer by the kernel of this name until the block ends; None: by the kernel that it chooses.

    Raises UsageError for an unknown name; a layer that the kernel cannot run raises one when it is called.
    """
    global _forced
    before, _forced = _forced, None if name is None else check_choice("kernel", name, names())
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def keeping_weights(how: str) -> Iterator[None]:
    """Until the block ends, `memory`: weights stay as packed as they are saved; `speed`: a kernel may keep them wider.

    By default DMQUANT_WEIGHTS says, or else `memory`. UsageError for another word.
    """
    global _kept
    before, _kept = _kept, check_choice("way to keep weights", how, KEPT)
    try:
        yield
    finally:
        _kept = before


def weights_kept() -> str:
    """How kernels keep weights now: `memory` or `speed`."""
    return _kept or check_choice(WEIGHTS_VARIABLE, os.environ.get(WEIGHTS_VARIABLE) or "memory", KEPT)


def select(layer: nn.Module, device: torch.device) -> Reference:
    """The kernel of a quantized layer for tensors on `device`; asked once a layer and device."""
    wanted = _forced or os.environ.get(VARIABLE) or None
    if torch.compiler.is_compiling():  # a choice remembered would be a guard that fails once it is made
        return KERNELS[_ask_once(layer, device, wanted)]
    choice = layer.kernel_choice
    if choice is None or choice[1:] != (device, wanted):
        layer.kernel_choice = choice = (_ask(layer, device, wanted), device, wanted)
    return KERNELS[choice[0]]


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """The product of a quantized Linear and a transformed input: (..., in) to (..., out), in the dtype of `x`."""
    return _prepared(layer, x.device).linear(x, layer)


def conv2d(x: Tensor, layer: nn.Module) -> Tensor:
    """The convolution of a transformed input (batch, channels, height, width) by a quantized Conv2d, in its dtype."""
    return _prepared(layer, x.device).conv2d(x, layer)


def _prepared(layer: nn.Module, device: torch.device) -> Reference:
    kernel = select(layer, device)
    if kernel.MAKES_WEIGHTS:
        if torch.compiler.is_compiling():
            _make_weights_once(layer, kernel.name, device)
        elif layer.kernel_weights_of != (kernel.name, device, weights_kept()):
            _make_weights(layer, kernel.name, device)
    return kernel


def _make_weights(layer: nn.Module, name: str, device: torch.device) -> None:
    choice = layer.kernel_choice
    layer.drop_kernel_weights()
    layer.kernel_choice = choice
    with torch.no_grad():
        for part, tensor in KERNELS[name].prepare(layer).items():
            layer.register_buffer(f"{PREFIX}{part}", tensor, persistent=False)
    layer.kernel_weights_of = name, device, weights_kept()


def _ask(layer: nn.Module, device: torch.device, wanted: str | None) -> str:
    if wanted is not None:
        kernel = KERNELS[check_choice("kernel", wanted, names())]
        if reason := kernel.refuses(layer, device) or kernel.missing():
            raise UsageError(f"kernel '{wanted}' cannot run this layer: {reason}; force no kernel, or reference")
        return wanted
    for name in names():
        if not (KERNELS[name].refuses(layer, device) or KERNELS[name].missing()):
            return name
    raise AssertionError("the reference runs every layer")


# What depends on the codes is asked and made while a graph is traced, and is no part of the graph.
_ask_once = torch.compiler.assume_constant_result(_ask)


@torch.compiler.assume_constant_result
def _make_weights_once(layer: nn.Module, name: str, device: torch.device) -> None:
    if layer.kernel_weights_of != (name, device, weights_kept()):
        _make_weights(layer, name, device)


def _find() -> None:
    for place in PLACES:
        for module in pkgutil.iter_modules(importlib.import_module(place).__path__):
            found = importlib.import_module(f"{place}.{module.name}")
            if hasattr(found, "KERNEL"):
                register(found.KERNEL)


_find()  # last, since kernels import from here
