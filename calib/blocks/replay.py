"""Run a backbone from the middle: finished modules return their stored outputs instead of computing them again.

Everything between the blocks (embeddings, modulation, skip connections) stays the backbone's own code, so a new
architecture needs nothing here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.data.tree import flatten, map_floats
from dmquant.errors import UserError

Arguments = tuple[tuple, dict[str, Any]]


class _ReachedError(Exception):
    """Carries the output of the module at which a replay ends out of the backbone's forward."""

    def __init__(self, output: Any):
        self.output = output


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute with `forward` until the block ends; its hooks still run."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def replay(backbone: nn.Module, arguments: Arguments, given: Mapping[str, Any], until: str) -> Any:
    """The output of the module `until`, in a forward pass where the modules named in `given` give those outputs.

    `given` may lack modules whose outputs the pass does not depend on. Gradients flow to the parameters of modules that
    are computed. Raises UserError where the pass does not reach `until`.
    """
    args, kwargs = arguments
    last = backbone.get_submodule(until)
    compute = last.forward

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _ReachedError(compute(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for name, output in given.items():
            stack.enter_context(replaced_forward(backbone.get_submodule(name), _giving(output)))
        stack.enter_context(replaced_forward(last, stop))
        try:
            backbone(*args, **kwargs)
        except _ReachedError as reached:
            return reached.output
    raise UserError(f"{until} was not reached in the backbone's forward")


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


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


def trace(backbone: nn.Module, arguments: Arguments, names: Sequence[str]) -> list[Traced]:
    """The modules `names` in the order in which one forward pass calls them; those never called are left out.

    Which block needs which output is found by trying: every output in turn is replaced by NaN, and the blocks whose
    inputs then hold NaN are those that need it. Raises UserError for a module that is called more than once.
    """
    outputs, saved, largest = _first_pass(backbone, arguments, names)
    order = list(outputs)
    return [
        Traced(
            name, outputs[name], _last_use(backbone, arguments, outputs, order, name), saved[name], max(largest[name])
        )
        for name in order
    ]  # fmt: skip


def _first_pass(
    backbone: nn.Module, arguments: Arguments, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, int], dict[str, list[int]]]:
    outputs: dict[str, Any] = {}
    inputs: dict[str, list[int]] = {name: [0] for name in names}
    storages: dict[str, dict[int, int]] = {name: {} for name in names}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}

    def watched(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[name][storage.data_ptr()] = storage.nbytes()
            return tensor

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in outputs:
                raise UserError(f"{name} runs more than once in a forward pass: it cannot be calibrated as one block")
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                output = compute(*_differentiable(args), **_differentiable(kwargs))
            outputs[name] = _detached(output)
            return outputs[name]

        return forward

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in names:
            module = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(module, watched(name, module.forward)))
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    hook = layer.register_forward_pre_hook(_noting(inputs[name]))
                    stack.callback(hook.remove)
        args, kwargs = arguments
        backbone(*args, **kwargs)
    return outputs, {name: sum(storages[name].values()) for name in outputs}, inputs


def _noting(sizes: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda layer, args: sizes.append(args[0].numel())


def _last_use(
    backbone: nn.Module, arguments: Arguments, outputs: dict[str, Any], order: list[str], poisoned: str
) -> int:
    position = order.index(poisoned)
    last_use = position

    def watched(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last_use
            if index > position and _holds_nan((args, kwargs)):
                last_use = index
            return map_floats(_nan, outputs[order[index]]) if index == position else outputs[order[index]]

        return forward

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, name in enumerate(order):
            stack.enter_context(replaced_forward(backbone.get_submodule(name), watched(index)))
        args, kwargs = arguments
        backbone(*args, **kwargs)
    return last_use


def _nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def _detached(value: Any) -> Any:
    return map_floats(Tensor.detach, value)


def _differentiable(value: Any) -> Any:
    return map_floats(lambda leaf: leaf.detach().requires_grad_(), value)


def _holds_nan(value: Any) -> bool:
    return any(leaf.is_floating_point() and bool(leaf.isnan().any()) for _, leaf in flatten(value)[1])
