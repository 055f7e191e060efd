"""Trace one forward pass: the order of the blocks, what each gives and keeps, and for how long others need it."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.replay import Arguments, replaced_forward
from dmquant.calib.data.tree import flatten, map_floats
from dmquant.errors import UserError


@dataclass(frozen=True)
class Traced:
    """A block as one forward pass shows it: its output for one sample, and for how long others need it."""

    name: str
    output: Any
    last_use: int
    """Index of the last block that needs the output through what runs between the blocks."""
    saved_bytes: int
    """Activations that autograd keeps of the block for one sample."""
    largest_input: int
    """Elements, for one sample, of the largest input of a linear layer or convolution in the block."""
    overwrites: bool
    """Whether the block writes into what its layers have read, which autograd may keep."""
    is_overwritten: bool
    """Whether what runs between the blocks writes into the output."""


def trace(
    backbone: nn.Module,
    arguments: Arguments,
    names: Sequence[str],
    computing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> list[Traced]:
    """The modules `names` in the order in which one forward pass calls them; those never called are left out.

    `computing` is entered for passes in which these modules compute; in others they are never run.

    Which block needs which output is found by trying: every output in turn is replaced by NaN, and the blocks whose
    inputs then hold NaN are those that need it. Raises UserError for a module that is called more than once, and for
    one that writes into a tensor which others read afterwards.
    """
    with computing():
        seen = _first_pass(backbone, arguments, names)
    outputs = {name: block.output for name, block in seen.items()}
    written = {name for name, block in seen.items() if block.is_overwritten()}
    if written or any(block.writes_input for block in seen.values()):
        with computing():
            _check_writes(backbone, arguments, seen)
    return [
        Traced(
            name, block.output, _last_use(backbone, arguments, outputs, written, name),
            sum(block.storages.values()), max(block.sizes), block.overwrites, name in written,
        )
        for name, block in seen.items()
    ]  # fmt: skip


Versions = list[tuple[Tensor, int]]
"""Tensors and how often each had been written into."""


@dataclass
class _Seen:
    """What the first pass saw of a block."""

    sizes: list[int] = field(default_factory=lambda: [0])
    storages: dict[int, int] = field(default_factory=dict)
    read: Versions = field(default_factory=list)
    output: Any = None
    returned: Versions = field(default_factory=list)
    overwrites: bool = False
    writes_input: bool = False

    def is_overwritten(self) -> bool:
        return _is_written(self.returned)


def _first_pass(backbone: nn.Module, arguments: Arguments, names: Sequence[str]) -> dict[str, _Seen]:
    """Every block on copies of its inputs, in the order in which they run."""
    seen = {name: _Seen() for name in names}
    order: list[str] = []

    def watched(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        block, parameters = seen[name], set()

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                block.storages[storage.data_ptr()] = storage.nbytes()
                block.read.append((tensor, tensor._version))
            return tensor

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in order:
                raise UserError(f"{name} runs more than once in a forward pass: it cannot be calibrated as one block")
            order.append(name)
            # only now: a hook may have moved the block to the device
            parameters.update(each.untyped_storage().data_ptr() for each in backbone.get_submodule(name).parameters())
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                args, kwargs = _differentiable((args, kwargs))
                given = _versions((args, kwargs))
                output = compute(*args, **kwargs)
            block.overwrites, block.writes_input = _is_written(block.read), _is_written(given)
            block.read.clear()
            block.output = map_floats(Tensor.detach, output)
            block.returned = _versions(block.output)
            return block.output

        return forward

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, block in seen.items():
            module = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(module, watched(name, module.forward)))
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    stack.callback(layer.register_forward_pre_hook(_noting(block)).remove)
        _run(backbone, arguments)
    return {name: seen[name] for name in order}


def _noting(block: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        block.sizes.append(args[0].numel())
        block.read.append((args[0], args[0]._version))

    return note


def _check_writes(backbone: nn.Module, arguments: Arguments, seen: Mapping[str, _Seen]) -> None:
    """UserError, naming a block, where the backbone gives something else once its blocks do not share tensors."""
    with torch.no_grad():
        as_it_is = _with_copies(backbone, arguments, ())
        if _same(as_it_is, _with_copies(backbone, arguments, seen)):
            return
        alone = (name for name in seen if not _same(as_it_is, _with_copies(backbone, arguments, [name])))
        name = next(alone, next(iter(seen)))
    raise UserError(
        f"{name} shares a tensor that is written into and read again elsewhere, so it cannot be calibrated as a block: "
        "let the model's code copy it first (x = x + y instead of x += y)"
    )


def _with_copies(backbone: nn.Module, arguments: Arguments, names: Iterable[str]) -> list[Tensor]:
    """The tensors that the backbone gives where these modules work on copies of their inputs, and return copies."""

    def copying(compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = map_floats(torch.clone, (args, kwargs))
            return map_floats(torch.clone, compute(*args, **kwargs))

        return forward

    with contextlib.ExitStack() as stack:
        for name in names:
            module = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(module, copying(module.forward)))
        return _tensors(_run(backbone, arguments))


def _last_use(
    backbone: nn.Module, arguments: Arguments, outputs: dict[str, Any], written: Collection[str], poisoned: str
) -> int:
    order = list(outputs)
    position = order.index(poisoned)
    last_use = position

    def watched(index: int) -> Callable[..., Any]:
        name = order[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last_use
            if index > position and _holds_nan((args, kwargs)):
                last_use = index
            if index == position:
                return map_floats(_nan, outputs[name])
            return map_floats(torch.clone, outputs[name]) if name in written else outputs[name]

        return forward

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, name in enumerate(order):
            stack.enter_context(replaced_forward(backbone.get_submodule(name), watched(index)))
        _run(backbone, arguments)
    return last_use


def _run(backbone: nn.Module, arguments: Arguments) -> Any:
    args, kwargs = map_floats(torch.clone, arguments)
    return backbone(*args, **kwargs)


def _versions(value: Any) -> Versions:
    return [(leaf, leaf._version) for _, leaf in flatten(value)[1]]


def _is_written(versions: Versions) -> bool:
    return any(tensor._version != version for tensor, version in versions)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a tensor, tuple, mapping or dataclass."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else None
    items = getattr(output, "__dict__", {}).values() if items is None else items
    return [tensor for item in items for tensor in _tensors(item)]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def _differentiable(value: Any) -> Any:
    """Copies that autograd follows, and that may be written into."""
    return map_floats(lambda leaf: leaf.detach().requires_grad_().clone(), value)


def _holds_nan(value: Any) -> bool:
    return any(leaf.is_floating_point() and bool(leaf.isnan().any()) for _, leaf in flatten(value)[1])
