"""A pipeline run to its final latents, and how often that calls the backbone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmquant.pipeline_call import call_pipeline


def final_latents(pipeline: Any, prompts: Sequence[str], seed: int, call: dict[str, Any]) -> Tensor:
    """Latents (prompts, channels, height, width) at the end of the schedule; prompt i has its own seed, `seed` + i.

    Args:
        call: arguments of the pipeline's call other than prompt, generator and output type.
    """
    seeds = [seed + index for index in range(len(prompts))]
    return call_pipeline(pipeline, prompts, seeds, "latent", call)


def backbone_calls(pipeline: Any, steps: int) -> int:
    """Calls of the backbone in one pipeline call of `steps` steps: some schedulers add some."""
    pipeline.scheduler.set_timesteps(steps)
    return len(pipeline.scheduler.timesteps)
