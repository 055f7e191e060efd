"""What errors of layers add to the final latents, to first order, from one pass back through the sampler.

The final latents z move by J e where a layer's output is e off in one step of the sampler. For a random vector v of
standard normal numbers, (v^T J e)^2 is |J e|^2 on average (Hutchinson's estimator), and v^T J is what one pass back
gives, for every layer and step at once. So the estimate for a change of a layer's weight by D is the mean over prompts
of (sum over steps and tokens of g^T D x)^2: the quadratic form of D with the Gauss-Newton matrix of |dz|^2.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmquant.calib.blocks.replay import replaced_forward

Change = Callable[[Tensor], Tensor]
"""The change of a layer's output, (rows, ...), that its input would make, in the output's shape."""


@dataclass
class Contributions:
    """g^T e of every watched layer and kind of change: `of[name, kind]` is (steps, prompts) float64."""

    of: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def total(self, name: str, kind: str) -> Tensor:
        """Squared changes of the latents by prompt, (prompts,), if the layer is changed in all steps."""
        return self.of[name, kind].sum(0).square()

    def by_step(self, name: str, kind: str) -> Tensor:
        """Squared changes by step and prompt, (steps, prompts), if the layer is changed in that step alone."""
        return self.of[name, kind].square()


class _Watched(torch.autograd.Function):
    """The identity of a layer's output, which on the way back tells its gradient beside the layer's input."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, leaf: Tensor, tell: Callable[[Tensor, Tensor, int], None], step: int
    ):
        ctx.save_for_backward(x)
        ctx.tell, ctx.step = tell, step
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (x,) = ctx.saved_tensors
        ctx.tell(x, gradient, ctx.step)
        return gradient, None, None, None, None


@contextmanager
def watching(
    backbone: nn.Module, changes: Mapping[str, Mapping[str, Change]], steps: int, prompts: int
) -> Iterator[Contributions]:
    """Let passes back through calls of the backbone add to the contributions of layers, until the block ends.

    `changes` are by layer and kind; several kinds of one layer are told apart, each as if it were alone.
    The backbone is called `steps` times, with rows of guidance branch by branch, each of all `prompts`. Its calls are
    checkpointed: a pass back computes each once more, and holds one call's activations at a time.
    """
    keys = [(name, kind) for name, of_layer in changes.items() for kind in of_layer]
    found = Contributions({key: torch.zeros(steps, prompts, dtype=torch.float64) for key in keys})
    leaf = torch.zeros((), requires_grad=True, dtype=torch.float32)
    calls = {"next": 0, "now": 0}

    def telling(name: str) -> Callable[[Tensor, Tensor, int], None]:
        def tell(x: Tensor, gradient: Tensor, step: int) -> None:
            with torch.no_grad():
                for kind, change in changes[name].items():
                    moved = (gradient.float() * change(x).float()).flatten(1).sum(1).double().cpu()
                    found.of[name, kind][step] += moved.view(-1, prompts).sum(0)

        return tell

    def watched(layer: nn.Module, tell: Callable[[Tensor, Tensor, int], None]) -> Callable[[Tensor], Tensor]:
        forward = layer.forward
        return lambda x: _Watched.apply(forward(x), x, leaf, tell, calls["now"])

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step = calls["next"]
            calls["next"] += 1

            def run() -> Any:
                calls["now"] = step
                return forward(*args, **kwargs)

            return checkpoint(run, use_reentrant=False, preserve_rng_state=False)

        return call

    with ExitStack() as stack:
        for name in changes:
            layer = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(layer, watched(layer, telling(name))))
        stack.enter_context(replaced_forward(backbone, checkpointed(backbone.forward)))
        yield found
