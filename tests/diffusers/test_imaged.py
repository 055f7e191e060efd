"""Pipelines that take images: which there are, that they share their parts, and what their backbones are given."""

import inspect

import diffusers
import pytest
import torch

from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.calib.data.tree import flatten
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import families, family_of_pipeline
from dmquant.diffusers.imaged import argument_for, with_parts_of
from dmquant.diffusers.posterior import seeded_posterior
from tests.calib.runs import call_of, without_padding
from tests.diffusers.test_arguments import arguments_of
from tests.tiny import TINY, tiny_sd
from tests.tiny.imaged import IMAGED

STEPS, COUNT, SEED = 4, 3, 7
SHORT = ("sd15 image", "sd15 image+mask", "sd15 control")
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in IMAGED]


def test_every_pipeline_that_a_family_names_is_one_of_diffusers_and_takes_its_images():
    for family in families().values():
        for base, others in family.imaged.items():
            assert base in family.pipelines
            for given, name in others.items():
                parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
                assert len({argument_for(kind, parameters) for kind in given}) == len(given)
                assert family_of_pipeline(name) is family
        for name in family.edits:
            assert "image" in inspect.signature(getattr(diffusers, name).__call__).parameters


def test_a_pipeline_of_another_kind_has_the_same_parts_as_they_are():
    base = tiny_sd().to(torch.bfloat16)
    base.vae.to(torch.float32)
    other = with_parts_of(base, diffusers.StableDiffusionImg2ImgPipeline)
    assert all(other.components[name] is part for name, part in base.components.items())
    assert {other.unet.dtype, other.text_encoder.dtype} == {torch.bfloat16}
    assert other.vae.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_is_given_what_a_call_for_one_prompt_and_its_image_gives_it(name, tmp_path):
    tiny = IMAGED[name]
    pipeline, family = tiny.build(), families()[tiny.family]
    images = tiny.images(COUNT)
    calls = Calls(tiny.prompts[:COUNT], SEED, call_of(name, STEPS) | images)
    with tiny.within():
        store = capture(
            pipeline,
            family.component,
            calls,
            sampling=Sampling("uniform", 99, 0.3),
            batch_size=min(2, tiny.most),
            folder=tmp_path,
            made_for={},
            **family.batching,
        )
        for prompt in range(COUNT):
            own = {argument: each[prompt] for argument, each in images.items()}
            one = Calls(tiny.prompts[:COUNT], SEED, {**calls.arguments, **own})
            with seeded_posterior(pipeline, [SEED + prompt]):
                given = arguments_of(pipeline, family.component, one, prompt)
            for index, sample in enumerate(store.samples):
                if sample.prompt == prompt:
                    both = (store.batch([index])[1], given[sample.step])
                    stored, passed = (flatten(without_padding(family, each)) for each in both)
                    assert stored[0] == passed[0]
                    for (leaf, left), (_, right) in zip(stored[1], passed[1], strict=True):
                        assert torch.allclose(left, right.expand_as(left), atol=1e-4), leaf


@pytest.mark.parametrize("name", [pytest.param("sd3 control", marks=pytest.mark.slow), "sd15 image"])
def test_an_image_is_encoded_alike_whatever_was_drawn_before(name):
    tiny = IMAGED[name]
    pipeline = tiny.build()
    calls = Calls(tiny.prompts[:1], SEED, call_of(name, 2) | tiny.images(1))
    first = calls.latents(pipeline, range(1))
    torch.rand(3)
    assert torch.equal(calls.latents(pipeline, range(1)), first)
    assert "encode" not in vars(pipeline.vae)


@pytest.mark.parametrize("name", ["sd15 control"])
def test_what_a_controlnet_says_is_among_the_arguments(name, tmp_path):
    tiny, family = IMAGED[name], families()["unet"]
    pipeline = tiny.build()
    calls = Calls(tiny.prompts[:2], SEED, call_of(name, 2) | tiny.images(2))
    store = capture(
        pipeline,
        family.component,
        calls,
        sampling=Sampling("uniform", 99, 0.3),
        batch_size=2,
        folder=tmp_path,
        made_for={},
        **family.batching,
    )
    _, arguments = store.batch([0])
    residuals = [*arguments["down_block_additional_residuals"], arguments["mid_block_additional_residual"]]
    assert len(residuals) == 5
    assert all(each.any() for each in residuals)
    assert tiny.family == TINY["sd15"].family
