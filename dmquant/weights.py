"""The `layer.weight` of a quantized layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_READ_ONLY = "a quantized layer's weight cannot be written to: fuse_lora(requantize=True), or keep the LoRA unfused"


class DequantizedWeight(Tensor):
    """A weight that is computed when its data is asked for, and no place to write to.

    Shape, dtype and device are known without; operations see and give plain tensors. RuntimeError for one that writes.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    _is_hf_initialized = True  # or transformers would draw numbers for it

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute = compute
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(_READ_ONLY)
        plain = tree_map_only(cls, lambda weight: weight.data, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    @property
    def data(self) -> Tensor:
        return self._compute().detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(_READ_ONLY)

    def numpy(self, *, force: bool = False) -> Any:
        return self.data.numpy(force=force)

    def tolist(self) -> Any:
        return self.data.tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return repr(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.data.clone()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.data.__reduce_ex__(protocol)
