"""Look on while a diffusers pipeline samples: every step of its scheduler, whichever the two are."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


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
        watch(float(torch.as_tensor(timestep).flatten()[0]), latents)
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
