"""Measure how much the final latents depend on the output of the backbone at each step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmquant.diffusers.arguments import Calls
from dmquant.errors import UserError

PROMPTS = 4
RELATIVE_NOISE = 1e-2


def measure_importance(
    pipeline: Any,
    component: str,
    calls: Calls,
    *,
    steps: int,
    batch_size: int,
    relative_noise: float = RELATIVE_NOISE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """The importance of every backbone call of a pipeline call, noisiest first.

    w_s = E |z(s) - z|^2 / delta^2, where z are the final latents, and z(s) those with delta RMS(o_s) n added to the
    output o_s of the backbone at step s alone; n is seeded standard normal noise, the RMS is taken over each row, and
    the mean over prompts and latent elements. To first order w_s is the squared size of dz/do_s times o_s, so steps
    compare by the harm that the same relative error does there.

    Args:
        component: attribute of the pipeline that is the backbone; it returns a tensor, or a tuple or dataclass that
            begins with one.
        steps: backbone calls of one pipeline call.
        batch_size: prompts a pipeline call; the weights depend on it by rounding alone.
        relative_noise: delta, small enough for z to respond linearly and far above the rounding of the dtype.
        progress: told after every pass of how many; there is one more than there are steps.

    Raises UserError where a weight is not finite.
    """
    backbone = getattr(pipeline, component)
    batches = [range(len(calls))[start : start + batch_size] for start in range(0, len(calls), batch_size)]

    def latents(hook_of: Callable[[range], Callable[..., Any]]) -> Tensor:
        found = []
        for batch in batches:
            handle = backbone.register_forward_hook(hook_of(batch))
            try:
                found.append(calls.latents(pipeline, batch))
            finally:
                handle.remove()
        return torch.cat(found).float()

    clean = latents(lambda batch: lambda *of_call: None)
    progress(1, steps + 1)
    weights = []
    for step in range(steps):
        noise = partial(_Disturbance, step, relative_noise, calls)
        weights.append((latents(noise) - clean).square().mean().item() / relative_noise**2)
        progress(step + 2, steps + 1)
    if not torch.tensor(weights, dtype=torch.float32).isfinite().all():
        raise UserError("the full-precision pipeline ends in NaN or infinity; try another --dtype")
    return weights


class _Disturbance:
    """A forward hook that adds noise to the output of one backbone call, for a `batch` of all prompts."""

    def __init__(self, step: int, relative_noise: float, calls: Calls, batch: range) -> None:
        self._step, self._relative_noise, self._called = step, relative_noise, 0
        self._prompts, self._images, self._batch = len(calls), calls.images, batch
        self._generator = torch.Generator("cpu").manual_seed(calls.seed)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        self._called += 1
        return _with_first(output, self._disturbed) if self._called == self._step + 1 else None

    def _disturbed(self, prediction: Tensor) -> Tensor:
        rms = prediction.float().square().mean(dim=tuple(range(1, prediction.dim())), keepdim=True).sqrt()
        branches = len(prediction) // (len(self._batch) * self._images)  # of the guidance, one behind the other
        shape = branches, self._prompts, self._images, *prediction.shape[1:]
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float32)
        noise = drawn[:, list(self._batch)].flatten(0, 2).to(prediction.device)
        return (prediction.float() + self._relative_noise * rms * noise).to(prediction.dtype)


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its first tensor changed: it is a tensor, or a tuple or dataclass that begins with one."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    first = dataclasses.fields(output)[0].name
    return dataclasses.replace(output, **{first: change(getattr(output, first))})
