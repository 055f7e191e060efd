"""Bounds on what a configuration makes a library build, taken from the files of its weights, before it builds that."""

import contextlib
import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from torch import nn
from torch.nn.modules import module as registration

from dmquant.errors import UserError

COUNTS = re.compile(r"(layers|layers_per_block|blocks|depths?)$")
"""Ends of the names of settings that count repeated layers, each with a tensor of its own at least."""
SIZES = re.compile(r"^(d|n|num)_|(dims?|sizes?|channels|heads|embeddings|width|length|features)$")
"""Parts of the names of settings that are sizes: of tensors, or of tables that are computed."""
TABLE = 1 << 24  # the largest size of a table that is computed, as of positions
FREE, EACH = 2000, 8  # modules and parameters that may be registered: so many, and so many for each tensor of the files
BUFFERS = 1 << 28  # bytes of buffers that are in no file, beside as many as the files hold


class Shaped(Protocol):
    """A tensor, or what a file's header says of one."""

    shape: tuple[int, ...]


def check_sizes(config: Mapping[str, Any], tensors: Collection[Shaped], where: str) -> None:
    """UserError for a number in `config`, also inside a part of it, that does not go with the `tensors` of its files.

    No more layers are counted than there are tensors, and no size is above the number of all their elements.
    """
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    for name, number in numbers(config):
        if COUNTS.search(name) and number > max(len(tensors), 1):
            fault = f"{len(tensors)} tensors"
        elif SIZES.search(name) and number > max(elements, TABLE):
            fault = f"{elements} numbers in all"
        else:
            continue
        raise UserError(f"{where} says {name}: {number}, but its files hold {fault}: get the model again")


def numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The integers in a configuration with the names of their settings, those in lists and in parts included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from numbers(value)
        else:
            yield from ((name, each) for each in (value if isinstance(value, list) else [value]) if type(each) is int)


@contextlib.contextmanager
def bounded(tensors: int, where: str) -> Iterator[None]:
    """Let models be built of not many more layers than there are `tensors`; UserError as soon as there are."""
    left, mine = FREE + EACH * tensors, threading.get_ident()

    def count(*registered: Any) -> None:
        nonlocal left
        if threading.get_ident() == mine:
            left -= 1
            if left < 0:
                raise UserError(f"{where} describes many more layers than the {tensors} tensors of its files: "
                                "get the model again")  # fmt: skip

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_buffers(model: nn.Module, stored_bytes: int, where: str) -> None:
    """UserError for a model whose buffers that no file holds would take far more memory than its files."""
    stored = model.state_dict().keys()
    computed = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)
    if computed > BUFFERS + stored_bytes:
        raise UserError(f"{where} describes tables of {computed / 1e9:.1f} GB beside {stored_bytes / 1e6:.0f} MB of "
                        "weights: get the model again")  # fmt: skip
