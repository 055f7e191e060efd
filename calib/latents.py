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
    scheduler = pipeline.scheduler
    # The shift by image size moves timesteps and adds none, but flow matching refuses to go without.
    shift = {"mu": 0.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    scheduler.set_timesteps(steps, **shift)
    return len(scheduler.timesteps)
