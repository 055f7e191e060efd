"""Watching a scheduler: every step is seen as the pipeline sees it, and nothing changes by being watched."""

import inspect

import pytest
import torch

from dmquant.diffusers.watching import watching_steps
from tests.tiny import IMAGE_SIZE, tiny_sd

from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler  # isort: skip

CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 3, "output_type": "latent"}


class Pipeline:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def ready(kind, steps=4):
    scheduler = kind()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_timestep_and_new_latents_are_seen_however_step_is_called(kind, by_name, return_dict):
    scheduler, seen = ready(kind), []
    sample, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    timestep = scheduler.timesteps[0]
    arguments = {"model_output": noise, "timestep": timestep, "sample": sample}
    with watching_steps(Pipeline(scheduler), lambda *step: seen.append(step)):
        given = (
            scheduler.step(**arguments, return_dict=return_dict)
            if by_name
            else scheduler.step(*arguments.values(), return_dict=return_dict)
        )
    [(seen_timestep, latents)] = seen
    assert seen_timestep == float(timestep)
    assert latents is (given.prev_sample if return_dict else given[0])


def test_a_watched_scheduler_takes_the_arguments_it_took():
    """Pipelines pass eta and a generator only to schedulers whose signature has them."""
    scheduler = ready(DDIMScheduler)
    before = inspect.signature(scheduler.step)
    with watching_steps(Pipeline(scheduler), lambda *step: None):
        assert inspect.signature(scheduler.step) == before


def test_a_stochastic_sampler_draws_the_same_noise_when_watched():
    pipeline = tiny_sd()

    def sample():
        generator = [torch.Generator().manual_seed(3)]
        with torch.inference_mode():
            return pipeline(prompt=["red apple"], generator=generator, eta=1.0, **CALL).images

    seen, plain = [], sample()
    with watching_steps(pipeline, lambda timestep, latents: seen.append(latents.clone())):
        watched = sample()
    assert torch.equal(watched, plain)
    assert len(seen) == 3
    assert torch.equal(seen[-1], plain)


def test_a_sampler_of_second_order_is_seen_at_every_call():
    pipeline, timesteps = tiny_sd(), []
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    with watching_steps(pipeline, lambda timestep, latents: timesteps.append(timestep)), torch.inference_mode():
        pipeline(prompt=["red apple"], generator=[torch.Generator().manual_seed(3)], **CALL)
    assert timesteps == pipeline.scheduler.timesteps.tolist()
    assert len(timesteps) == 5  # the last of three steps is of first order


def test_the_scheduler_is_left_as_it_was_even_after_an_error():
    scheduler = ready(DDIMScheduler)
    before = dict(vars(scheduler))
    with watching_steps(Pipeline(scheduler), lambda *step: None), pytest.raises(TypeError):
        scheduler.step()
    assert vars(scheduler) == before
    scheduler.step = own = scheduler.step
    with watching_steps(Pipeline(scheduler), lambda *step: None):
        assert scheduler.step is not own
    assert scheduler.step is own


def test_a_pipeline_without_a_scheduler_is_not_watched():
    with watching_steps(object(), lambda *step: pytest.fail("there is nothing to see")):
        pass
