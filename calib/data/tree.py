"""Nested call arguments as a flat list of tensors and a skeleton that JSON can hold, and back."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmquant.errors import UserError

PLAIN = (type(None), bool, int, float, str)


class Leaf(NamedTuple):
    """A tensor and where it was found, as in `added_cond_kwargs.time_ids`."""

    name: str
    tensor: Tensor

    @property
    def argument(self) -> str:
        """The outermost key of its place: `added_cond_kwargs`."""
        return re.split(r"[.\[]", self.name, maxsplit=1)[0]


def flatten(tree: Any) -> tuple[Any, list[Leaf]]:
    """A skeleton of dicts, lists and plain values, and the tensors that belong in it, in order.

    In the skeleton every container is a dict with its kind as the only key, a tensor is its number, and a torch.Size
    a tuple. Raises UserError, naming the place, for anything else than dict with text keys, list, tuple, None, bool,
    int, float, str, Tensor.
    """
    leaves: list[Leaf] = []
    skeleton = _flatten(tree, "", leaves)
    return skeleton, leaves


def unflatten(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `flatten`: the tree of a skeleton with these `tensors`, of any shape and dtype, in order."""
    if not isinstance(skeleton, dict):
        return skeleton
    [(kind, content)] = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(value, tensors) for key, value in content.items()}
    items = [unflatten(value, tensors) for value in content]
    return tuple(items) if kind == "tuple" else items


def map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to the floating-point tensors, of any shape, of nested arguments or outputs."""
    skeleton, leaves = flatten(value)
    return unflatten(skeleton, [function(leaf) if leaf.is_floating_point() else leaf for _, leaf in leaves])


def _flatten(tree: Any, path: str, leaves: list[Leaf]) -> Any:
    kind = type(tree)
    if kind in PLAIN:
        return tree
    if isinstance(tree, torch.Tensor):
        leaves.append(Leaf(path, tree))
        return {"tensor": len(leaves) - 1}
    if kind is dict and all(type(key) is str for key in tree):
        inside = f"{path}." if path else ""
        return {"dict": {key: _flatten(value, f"{inside}{key}", leaves) for key, value in tree.items()}}
    if kind in (list, tuple, torch.Size):
        return {
            "list" if kind is list else "tuple": [
                _flatten(value, f"{path}[{index}]", leaves) for index, value in enumerate(tree)
            ]
        }
    raise UserError(f"the argument {path} is of type {kind.__name__}, which cannot be kept as calibration data")
