"""A layer's memory of its kernel: the one chosen, and the weights that the kernel made from the layer's codes."""

from typing import Any

import torch
from torch import nn

CODES = ("qweight", "scale", "scale_base")
PREFIX = "kernel_"
SPECS = ("weight_spec", "activations", "transforms")


class Chosen(nn.Module):
    """A layer that chooses its kernel anew, which makes its weights anew, when the layer moves, or its codes change
    or what they mean.

    Neither the choice nor those weights are saved or copied.
    """

    kernel_choice: tuple[str, torch.device, str | None] | None = None
    """The kernel's name, and what it was chosen for: a device, and the kernel that was forced, if any."""
    kernel_weights_of: tuple[str, torch.device, str] | None = None
    """The kernel that made weights of its own here, as buffers `kernel_<name>`, where, and how they are kept."""
    signature = ""
    """All that its output depends on besides tensors, in words."""
    kernel_plan: Any = None
    """What the kernel keeps besides tensors, made from them."""

    def drop_kernel_weights(self) -> None:
        """Forget the kernel and its weights; the next call chooses one, which makes its weights from the codes then."""
        for name in [name for name in self._buffers if name.startswith(PREFIX)]:
            delattr(self, name)
        self.kernel_choice = self.kernel_weights_of = self.kernel_plan = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*CODES, *SPECS) and self.kernel_choice:
            self.drop_kernel_weights()
        super().__setattr__(name, value)
        if name in SPECS:
            named = ("weight_shape", *self.geometry, *SPECS)
            self.signature = f"{type(self).__name__} {[vars(self).get(each) for each in named]}"

    def __getstate__(self) -> dict[str, Any]:
        own = ("kernel_choice", "kernel_weights_of", "kernel_plan")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        buffers = {name: buffer for name, buffer in self._buffers.items() if not name.startswith(PREFIX)}
        passing = {name for name in self._non_persistent_buffers_set if not name.startswith(PREFIX)}
        return state | {"_buffers": buffers, "_non_persistent_buffers_set": passing}

    def _apply(self, fn: Any, recurse: bool = True) -> "Chosen":
        self.drop_kernel_weights()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_kernel_weights()
        super()._load_from_state_dict(*args, **kwargs)
