"""Kernels: how a quantized layer multiplies. One module here is one kernel, its `KERNEL`.

The reference defines the meaning. The kernel of the least cost that takes a layer runs it, unless one is forced: by
`forced`, or by the environment variable DMQUANT_KERNEL.
"""

import contextlib
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmquant.errors import UsageError, unknown
from dmquant.kernels.chosen import PREFIX, Choice, Chosen
from dmquant.kernels.reference import Reference

__all__ = ["Chosen", "Reference", "conv2d", "forced", "linear", "names", "prepare_", "register", "select", "used"]

VARIABLE = "DMQUANT_KERNEL"
_NO_KERNELS = ("chosen",)
_own = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_KERNELS]
_kernels = [importlib.import_module(f"{__name__}.{name}").KERNEL for name in _own]
KERNELS: dict[str, Reference] = {kernel.name: kernel for kernel in _kernels}
_forced: str | None = None


def names() -> tuple[str, ...]:
    """Names of all kernels, those that are preferred first."""
    return tuple(sorted(KERNELS, key=lambda name: KERNELS[name].cost))


def register(kernel: Reference) -> None:
    """Add a kernel from outside, which layers that have chosen none yet may take; UsageError for a name taken."""
    if kernel.name in KERNELS:
        raise UsageError(f"there is a kernel '{kernel.name}' already: choose another name")
    KERNELS[kernel.name] = kernel


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run every layer by the kernel of this name until the block ends; None: by what each would choose.

    Raises UsageError for a name there is none of; a layer that the kernel cannot run raises one when it is called.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def select(layer: nn.Module, device: torch.device) -> Reference:
    """The kernel of a quantized layer for tensors on `device`; asked once a layer and device."""
    wanted = _forced or _known(os.environ.get(VARIABLE) or None)
    if torch.compiler.is_compiling():  # a choice remembered would be a guard that fails once it is made
        return KERNELS[_ask(layer, device, wanted)]
    choice = layer.kernel_choice
    if choice is None or choice[1:] != (device, wanted):
        layer.kernel_choice = choice = Choice(_ask(layer, device, wanted), device, wanted)
    return KERNELS[choice.kernel]


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """What a quantized Linear gives for a transformed input: (..., in features) to (..., out features), x's dtype."""
    return _prepared(layer, x.device).linear(x, layer)


def conv2d(x: Tensor, layer: nn.Module) -> Tensor:
    """What a quantized Conv2d gives for a transformed input (batch, channels, height, width), in its dtype."""
    return _prepared(layer, x.device).conv2d(x, layer)


def prepare_(module: nn.Module) -> None:
    """Choose the kernel of every quantized layer of `module` now, and let it make its own weights.

    A first call does so too, but inside of torch.compile that breaks the graph.
    """
    for layer in _quantized(module):
        _prepared(layer, layer.qweight.device)


def used(module: nn.Module) -> dict[str, int]:
    """How many quantized layers of `module` each kernel runs: by its last call, or, before any, by what it would be."""
    return dict(Counter(layer.kernel for layer in _quantized(module)))


def _quantized(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, Chosen))


def _prepared(layer: nn.Module, device: torch.device) -> Reference:
    kernel = select(layer, device)
    if kernel.MAKES_WEIGHTS and layer.kernel_weights_of != (kernel.name, device):
        _make_weights(layer, kernel, device)
    return kernel


@torch.compiler.disable
def _make_weights(layer: nn.Module, kernel: Reference, device: torch.device) -> None:
    layer.drop_kernel_weights()
    with torch.no_grad():
        for name, tensor in kernel.prepare(layer).items():
            layer.register_buffer(f"{PREFIX}{name}", tensor, persistent=False)
    layer.kernel_weights_of = kernel.name, device


def _ask(layer: nn.Module, device: torch.device, wanted: str | None) -> str:
    if wanted is not None:
        if reason := KERNELS[wanted].missing() or KERNELS[wanted].refuses(layer, device):
            raise UsageError(f"kernel '{wanted}' cannot run this layer: {reason}; force no kernel, or reference")
        return wanted
    for name in names():
        if not (KERNELS[name].missing() or KERNELS[name].refuses(layer, device)):
            return name
    raise AssertionError("the reference runs every layer")


def _known(name: str | None) -> str | None:
    if name is not None and name not in KERNELS:
        raise unknown("kernel", name, names(), f"known: {', '.join(names())}")
    return name
