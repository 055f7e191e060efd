"""Run a backbone from the middle: finished modules return their stored outputs instead of computing them again.

Everything between the blocks (embeddings, modulation, skip connections) stays the backbone's own code, so a new
architecture needs nothing here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from dmquant.calib.data.tree import in_own_containers
from dmquant.errors import UserError

Arguments = tuple[tuple, dict[str, Any]]


class _ReachedError(Exception):
    """Carries the output of the module at which a replay ends out of the backbone's forward."""

    def __init__(self, output: Any):
        self.output = output


@contextlib.contextmanager
def replaced(owner: Any, method: str, by: Callable[..., Any]) -> Iterator[None]:
    """Let `owner` compute with another method until the block ends; it need not have one of that name."""
    before = vars(owner).get(method)
    setattr(owner, method, by)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Let `module` compute with `forward` until the block ends; its hooks still run."""
    return replaced(module, "forward", forward)


def replay(backbone: nn.Module, arguments: Arguments, given: Mapping[str, Any], until: str) -> Any:
    """The output of the module `until`, in a forward pass where the modules named in `given` give those outputs.

    `given` may lack modules whose outputs the pass does not depend on. Gradients flow to the parameters of modules that
    are computed. Raises UserError where the pass does not reach `until`.
    """
    args, kwargs = in_own_containers(arguments)
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
    raise _not_reached(until)


def replay_on(
    backbone: nn.Module, arguments: Arguments, given: Mapping[str, Any], through: str, passed_on: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """The output of the module `through`, and what the backbone returns where `passed_on(output)` goes on from there.

    `given` is as for `replay`, and so are gradients. Raises UserError where the pass does not reach `through`.
    """
    args, kwargs = in_own_containers(arguments)
    module, outputs = backbone.get_submodule(through), []
    compute = module.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        outputs.append(compute(*args, **kwargs))
        return passed_on(outputs[-1])

    with contextlib.ExitStack() as stack:
        for name, output in given.items():
            stack.enter_context(replaced_forward(backbone.get_submodule(name), _giving(output)))
        stack.enter_context(replaced_forward(module, keep))
        returned = backbone(*args, **kwargs)
    if not outputs:
        raise _not_reached(through)
    return outputs[0], returned


def _not_reached(module: str) -> UserError:
    return UserError(f"{module} was not reached in the backbone's forward")


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
