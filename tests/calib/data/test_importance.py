import pytest
import torch

from dmquant.calib.data.importance import measure_importance
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import families
from dmquant.errors import UserError
from tests.calib.runs import call_of
from tests.calib.toy import Output, Toy
from tests.tiny import IMAGE_SIZE, TINY, tiny_sd

SIZES, VALUES = [3.0, 0.5, 0.0, 1.0], [1.0, 4.0, 7.0, 0.1]
CALL = {"num_inference_steps": 4}


@pytest.mark.parametrize("wrap", [lambda p: (p, "more"), lambda p: p, Output], ids=["tuple", "tensor", "dataclass"])
def test_a_pipeline_whose_final_latents_are_a_known_sum(wrap):
    """z = z0 - sum size_s value_s: noise of RMS delta value_s moves it by size_s delta value_s, w = (size value)^2."""
    toy = Toy(SIZES, VALUES, wrap)
    passes = []
    weights = measure_importance(
        toy,
        "unet",
        Calls(["a", "bb"], 0, CALL),
        steps=4,
        batch_size=2,
        progress=lambda done, total: passes.append((done, total)),
    )
    expected = [(size * value) ** 2 for size, value in zip(SIZES, VALUES, strict=True)]
    assert weights == pytest.approx(expected, rel=0.1, abs=1e-6)
    assert passes == [(done, 5) for done in range(1, 6)]
    assert not toy.unet._forward_hooks


def test_a_diffusers_pipeline_responds_linearly_and_as_before():
    pipeline = tiny_sd()
    call = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 3, "guidance_scale": 3.0}
    calls = Calls(["red cat"], 0, call)
    large, small, again = (
        measure_importance(pipeline, "unet", calls, steps=3, batch_size=1, relative_noise=noise)
        for noise in (1e-2, 3e-3, 1e-2)
    )
    assert large == again
    assert all(weight > 0 for weight in large)
    assert torch.tensor(large).log().sub(torch.tensor(small).log()).abs().max() < 0.2


def test_a_pipeline_that_ends_in_nan():
    with pytest.raises(UserError, match="NaN or infinity"):
        measure_importance(Toy([1.0, 1.0], [1.0, float("nan")]), "unet", Calls(["a"], 0, CALL), steps=2, batch_size=1)


@pytest.mark.parametrize("model", ["flux", "hunyuan-1.2", "dit"])
def test_every_step_of_a_pipeline_has_a_measured_importance(model):
    """Flux packs its latents, Hunyuan's sampler draws noise on the way, DiT takes classes."""
    tiny, family = TINY[model], families()[TINY[model].family]
    pipeline = family.prompted(tiny.build())
    calls = Calls(tiny.prompts[:2], 0, call_of(model, 3))
    weights = measure_importance(pipeline, family.component, calls, steps=3, batch_size=2)
    assert len(weights) == 3
    assert min(weights) > 0


@pytest.mark.parametrize("model", ["sd15", "pixart-sigma"])
def test_no_call_has_more_prompts_than_a_batch_and_the_noise_of_each_stays(model):
    tiny, family = TINY[model], families()[TINY[model].family]
    pipeline, rows = family.prompted(tiny.build()), set()
    backbone = getattr(pipeline, family.component)
    backbone.register_forward_hook(lambda module, args, output: rows.add(len(output[0])))
    calls, found = Calls((tiny.prompts * 3)[:3], 0, call_of(model, 2)), {}
    for batch_size in (3, 2):
        found[batch_size] = measure_importance(pipeline, family.component, calls, steps=2, batch_size=batch_size)
    assert found[2] == pytest.approx(found[3], rel=0.02)
    rows.clear()
    measure_importance(pipeline, family.component, calls, steps=2, batch_size=1)
    assert rows == {2}  # both branches of the guidance of one prompt
