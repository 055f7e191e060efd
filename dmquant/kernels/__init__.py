"""How a quantized layer is executed: modules with the same functions, whose meaning the reference defines."""

from types import ModuleType

import torch

from dmquant.kernels import cpu, reference

_forced: ModuleType | None = None


def select(device: torch.device) -> ModuleType:
    """The kernels for tensors on `device`."""
    return _forced or (cpu if device.type == "cpu" else reference)


def use_reference(on: bool) -> None:
    """Run every layer by the reference kernels (or stop doing so): slower, for checking the others."""
    global _forced
    _forced = reference if on else None
