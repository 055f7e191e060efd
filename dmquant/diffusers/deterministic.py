"""Images that do not depend on the batch they are made in: every part of a pipeline computes one row at a time.

Which kernel a library takes for a product, and so how its sum is rounded, depends on the shape of all operands, rows of
the batch included. In full precision that moves a result by its last bits; where activations are quantized, these
decide between two codes.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusers.families import family_of_backbone

LEFT_WHOLE = ("safety_checker",)  # parts that only look at finished images


@contextlib.contextmanager
def deterministic(pipeline: Any) -> Iterator[None]:
    """Until the block ends, the pipeline makes an image bit by bit as it would alone, whatever else is in the batch.

    Text encoders, backbone and VAE are called as before, with any number of rows (two an image, with guidance), and
    compute them one after another, always in the same shapes: batching saves no time any more. On one machine, with
    equal threads; the pipeline's own arithmetic between these calls must go element by element, as samplers' does.
    Works on pipelines in full precision and quantized, compiled or offloaded.

    Args:
        pipeline: a diffusers pipeline; prompts that it pads to the longest of a batch still depend on that one.
    """
    parts = {id(part): part for name, part in pipeline.components.items() if name not in LEFT_WHOLE}
    with contextlib.ExitStack() as stack:
        for part in parts.values():
            if hasattr(part, "clear_cache"):
                stack.enter_context(_sliced(part))
                continue
            for module in _called(part):
                stack.enter_context(_row_by_row(module))
        yield


@contextlib.contextmanager
def _sliced(vae: Any) -> Iterator[None]:
    """Decode row by row, with one call of the whole for each: a VAE of videos hands lists of what it knows of earlier
    frames to its modules, which add to them."""
    before, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = before


def _called(part: Any) -> list[nn.Module]:
    """The modules of a part that a pipeline, or another method of the part, calls: a VAE is not called itself."""
    if not isinstance(part, nn.Module):
        return []
    return list(part.children()) if hasattr(part, "decode") else [part]


@contextlib.contextmanager
def _row_by_row(module: nn.Module) -> Iterator[None]:
    """Calls of the module are one call a row, hooks included, until the block ends."""
    kind, plain = type(module), type(getattr(module, "_orig_mod", module))
    family = family_of_backbone(plain.__name__)
    signature, shared = inspect.signature(plain.forward), frozenset(family.shared if family else ())
    names = list(signature.parameters)[1:]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        batch = _Batch.of([arguments[name] for name in names if name in arguments])
        outputs = []
        for row in range(batch.rows):
            own = {name: value if name in shared else batch.cut(value, row) for name, value in arguments.items()}
            outputs.append(kind.__call__(self, *(own.pop(name) for name in names[: len(args)]), **own))
        return batch.joined(outputs)

    # Not a new `forward`: hooks and compiled code, which a call goes through first, must see one row as well. The class
    # is set past `__setattr__`, which a compiled module passes on to the one within.
    row_by_row = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    object.__setattr__(module, "__class__", row_by_row)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", kind)


@dataclass(frozen=True)
class _Batch:
    """The rows of a call, each an entry of the first dimension of tensors or, where `listed`, of lists of tensors."""

    rows: int
    listed: bool = False

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "_Batch":
        """As the first argument that has any says."""
        for value in arguments:
            if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()):
                return cls(len(value), isinstance(value, list))
        return cls(1)

    def cut(self, value: Any, row: int) -> Any:
        """A row of all in `value` that has as many; a tensor in memory of its own, laid out alike in every batch."""
        if isinstance(value, Tensor):
            if value.dim() == 0 or len(value) != self.rows:
                return value
            return value[row : row + 1].clone(memory_format=torch.contiguous_format)
        if self.listed and isinstance(value, list) and len(value) == self.rows:
            return value[row : row + 1]
        if isinstance(value, Mapping):
            return {name: self.cut(each, row) for name, each in value.items()}
        return type(value)(self.cut(each, row) for each in value) if isinstance(value, list | tuple) else value

    def joined(self, outputs: Sequence[Any]) -> Any:
        """The outputs of all rows as one; of what has no rows, such as a number or a cache, the first row's."""
        first = outputs[0]
        if isinstance(first, Tensor) and first.dim():
            return torch.cat(outputs)
        if self.listed and isinstance(first, list):
            return list(chain(*outputs))
        if isinstance(first, Mapping):
            return type(first)(**{name: self.joined([each[name] for each in outputs]) for name in first})
        if isinstance(first, list | tuple):
            return type(first)(map(self.joined, zip(*outputs, strict=True)))
        return first
