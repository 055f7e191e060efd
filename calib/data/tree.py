"""Nested call arguments as a flat list of tensors and a skeleton that JSON can hold, and back."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
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


def unflatten(skeleton: Any, tensors: Sequence[Tensor], samples: int = 1) -> Any:
    """The inverse of `flatten`: the tree of a skeleton with these `tensors`, of any shape and dtype, in order.

    Lists with an entry a row are those of so many `samples`; a mask that is true everywhere becomes None.
    """
    if not isinstance(skeleton, dict):
        return skeleton
    [(kind, content)] = skeleton.items()
    if kind in ("tensor", "padded"):
        return tensors[content]
    if kind == "mask":
        return None if tensors[content].all() else tensors[content]
    if kind == "dict":
        return {key: unflatten(value, tensors, samples) for key, value in content.items()}
    items = [unflatten(value, tensors, samples) for value in content]
    if kind == "rows":
        return items * samples
    return tuple(items) if kind == "tuple" else items


def of_rows(skeleton: Any, rows: Sequence[int], padded: Mapping[str, str], listed: Collection[str]) -> Any:
    """The skeleton of a call's arguments by name, for some of its rows; what differs between calls is marked.

    `padded` arguments, whose rows may be longer in another call, become of kind "padded", their masks "mask", and lists
    with an entry a row "rows". A pipeline that makes several images a prompt lists the prompts alone.
    """
    content = dict(skeleton["dict"])
    for name in listed:
        [entries] = content[name].values()
        content[name] = {"rows": [entries[row % len(entries)] for row in rows]}
    for name, mask in padded.items():
        content |= {name: {"padded": content[name]["tensor"]}, mask: {"mask": content[mask]["tensor"]}}
    return {"dict": content}


def may_be_padded(skeleton: Any) -> frozenset[int]:
    """Numbers of the tensors in a skeleton of arguments by name whose rows may differ in length, masks among them."""
    inside = skeleton.get("dict", {}).values() if isinstance(skeleton, dict) else ()
    kinds = [next(iter(value.items())) for value in inside if isinstance(value, dict)]
    return frozenset(content for kind, content in kinds if kind in ("padded", "mask"))


def map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to the floating-point tensors, of any shape, of nested arguments or outputs."""
    skeleton, leaves = flatten(value)
    return unflatten(skeleton, [function(leaf) if leaf.is_floating_point() else leaf for _, leaf in leaves])


def in_own_containers(value: Any) -> Any:
    """The same tensors in dicts, lists and tuples that nobody else has: HunyuanDiT empties a list that it is given."""
    return map_floats(lambda tensor: tensor, value)


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
