"""Calls of a pipeline: what it raises, and what it lacks, is one line that names it."""

import pytest
import torch

from dmquant.diffusers.calling import call_pipeline
from dmquant.errors import UserError
from tests.tiny import tiny_sd

CALL = {"height": 32, "width": 32, "num_inference_steps": 1}


def without_pad_token(pipeline):
    pipeline.tokenizer.pad_token = None


def with_a_prediction_of_no_type(pipeline):
    pipeline.scheduler.register_to_config(prediction_type="nothing")


def without_vae(pipeline):
    pipeline.register_modules(vae=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_pad_token, "cannot be called with prompts, height, width, .* pad"),
        (with_a_prediction_of_no_type, "cannot be called with prompts, .*prediction_type given as nothing"),
        (without_vae, r"has no vae, so it makes no images: add what is missing to its folder and model_index\.json$"),
    ],
)
def test_what_is_wrong_with_a_part_is_one_line(change, message):
    pipeline = tiny_sd()
    change(pipeline)
    with pytest.raises(UserError, match=message) as refused:
        call_pipeline(pipeline, ["red apple", "blue cat on the tree"], [0, 1], "np", CALL)
    assert "\n" not in str(refused.value)


def test_out_of_memory_and_interrupts_stay_what_they_are():
    pipeline = tiny_sd()
    for error in (torch.OutOfMemoryError("CUDA"), KeyboardInterrupt()):
        handle = pipeline.unet.register_forward_pre_hook(lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            call_pipeline(pipeline, ["red apple"], [0], "latent", CALL)
        handle.remove()
