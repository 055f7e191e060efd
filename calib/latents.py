"""A pipeline run to its final latents, and how often that calls the backbone."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def final_latents(pipeline: Any, prompts: Sequence[str], seed: int, call: dict[str, Any]) -> Tensor:
    """Latents (prompts, channels, height, width) at the end of the schedule; prompt i has its own seed, `seed` + i.

    Args:
        call: arguments of the pipeline's call other than prompt, generator and output type.
    """
    generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
    with _no_progress_bar(pipeline), torch.inference_mode():
        return pipeline(prompt=list(prompts), generator=generators, output_type="latent", **call).images


def backbone_calls(pipeline: Any, steps: int) -> int:
    """Calls of the backbone in one pipeline call of `steps` steps: some schedulers add some."""
    pipeline.scheduler.set_timesteps(steps)
    return len(pipeline.scheduler.timesteps)


@contextlib.contextmanager
def _no_progress_bar(pipeline: Any) -> Iterator[None]:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
