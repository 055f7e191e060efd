"""Watch a diffusers pipeline while it samples: every step of its scheduler, the inputs of its VAE."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def watching_steps(pipeline: Any, watch: Callable[[float, Tensor], None]) -> Iterator[None]:
    """Call `watch(timestep, latents)` after every call of the scheduler's `step` until the block ends.

    The latents are those that the step gives, as the pipeline goes on with them. Schedulers of second order step twice
    at most of their timesteps. A pipeline without a scheduler is never watched.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        yield
        return
    step, own = scheduler.step, vars(scheduler).get("step")
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines look into the signature to find out which arguments a scheduler takes
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        timestep = signature.bind(*args, **kwargs).arguments["timestep"]
        latents = output[0] if isinstance(output, tuple) else output.prev_sample
        watch(float(torch.as_tensor(timestep, dtype=torch.float64).flatten()[0]), latents)
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own


@contextlib.contextmanager
def recording_latents(pipeline: Any) -> Iterator[list[Tensor]]:
    """Collect what the pipeline's sampler hands to its VAE while the block runs: float32 [images, ...] a call.

    Pipelines divide the latents by the VAE's scaling factor, and some shift them, just before they decode. The factor
    is undone here; a shift stays, and cancels where latents are subtracted. A pipeline without a VAE gives nothing.
    """
    taken: list[Tensor] = []
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield taken
        return
    decode, own = vae.decode, vars(vae).get("decode")
    factor = getattr(vae.config, "scaling_factor", None) or 1.0

    def recording(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(latents.float().cpu() * factor)
        return decode(latents, *args, **kwargs)

    vae.decode = recording
    try:
        yield taken
    finally:
        del vae.decode
        if own is not None:
            vae.decode = own


@contextlib.contextmanager
def rehearsing(backbone: nn.Module) -> Iterator[None]:
    """Let a pipeline go through all its calls of the backbone while the block runs, at the price of one.

    The first call with inputs of a shape is computed, and the others of that shape are answered alike, so the images
    are of no use.
    """
    compute, own = backbone.forward, vars(backbone).get("forward")
    answers: dict[Any, Any] = {}

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if shapes not in answers:
            answers[shapes] = compute(*args, **kwargs)
        return answers[shapes]

    backbone.forward = forward
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
