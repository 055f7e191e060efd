"""Runs to tune by: what of them is full precision's, what the student's, and that gradients come through samplers."""

import copy

import pytest
import torch

from dmquant.calib.tuning.runs import MOST_CALLS, Runs, last_calls, rehearsed_calls
from dmquant.diffusers.families import families
from dmquant.errors import UserError
from tests.calib.tuning.cases import STEPS, calls_of, runs_of, tiny
from tests.tiny import TINY

MODEL, NOTHING = "pixart-sigma", -200.0  # dB of no error


@pytest.fixture(scope="module")
def pipeline():
    return tiny(MODEL)


def scaled_(backbone, factor):
    with torch.no_grad():
        backbone.proj_out.weight *= factor
    return backbone


def test_full_precision_ends_where_it_ended_and_a_student_where_the_pipeline_with_it_does(pipeline, tmp_path):
    own = copy.deepcopy(pipeline)
    runs = {last: runs_of(MODEL, own, tmp_path, last) for last in (1, 3, None)}
    for of in runs.values():
        assert [of.error(number).item() for number in range(len(of))] == [NOTHING, NOTHING]
    wanted = calls_of(MODEL).latents(own, range(2))
    scaled_(own.transformer, 1.1)
    first, second = (calls_of(MODEL).latents(own, range(2)) - wanted).square().mean((1, 2, 3)).log10()
    assert runs[None].error(0).item() == pytest.approx(5 * (first + second).item(), rel=1e-4)
    assert NOTHING < runs[1].error(0).item() != runs[3].error(0).item() > NOTHING


def test_only_the_last_calls_are_the_students(pipeline, tmp_path):
    own, computed = copy.deepcopy(pipeline), []
    runs = runs_of(MODEL, own, tmp_path, last=2)
    own.transformer.proj_out.register_forward_hook(lambda *call: computed.append(True))
    runs.error(1)
    assert len(computed) == 2


@pytest.mark.parametrize("model", [name for name in TINY if TINY[name].family != "dit"])
def test_gradients_come_through_the_sampler_of_every_family(model, tmp_path):
    own = tiny(model)
    runs = runs_of(model, own, tmp_path, last=2, batch_size=4)
    backbone = getattr(own, families()[TINY[model].family].component)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter *= 1.01
    runs.error(0).backward()
    gradients = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def test_a_gradient_is_that_of_a_small_change(pipeline, tmp_path):
    own = copy.deepcopy(pipeline).to(dtype=torch.float64)
    runs = runs_of(MODEL, own, tmp_path, last=2)
    bias, small = scaled_(own.transformer, 1.1).proj_out.bias, 1e-4
    runs.error(0).backward()
    place = int(bias.grad.abs().argmax())
    found = []
    for step in (small, -2 * small):
        with torch.no_grad():
            bias[place] += step
            found.append(runs.error(0).item())
    assert bias.grad[place].item() == pytest.approx((found[0] - found[1]) / (2 * small), rel=1e-3)


def test_prompts_are_encoded_once_and_what_is_kept_serves_another_process(pipeline, tmp_path):
    own, encoded = copy.deepcopy(pipeline), []
    own.text_encoder.register_forward_hook(lambda *call: encoded.append(True))
    runs_of(MODEL, own, tmp_path, last=2)
    assert encoded
    encoded.clear()
    assert runs_of(MODEL, own, tmp_path, last=2).error(1).item() == NOTHING
    assert not encoded
    runs_of(MODEL, own, tmp_path, last=2, key="other weights")
    assert encoded


def test_a_damaged_run_is_made_again(pipeline, tmp_path):
    runs_of(MODEL, pipeline, tmp_path, last=2)
    [path] = tmp_path.glob("*/runs-00001.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert runs_of(MODEL, pipeline, tmp_path, last=2).error(1).item() == NOTHING
    assert path.read_bytes() == whole


def test_how_many_calls_move_the_image(pipeline, tmp_path):
    calls = calls_of(MODEL)
    given = rehearsed_calls(pipeline, "transformer", calls)
    assert len(given) == STEPS
    assert given[0][1]["timestep"][0] > given[-1][1]["timestep"][0]
    computed, own = [], copy.deepcopy(pipeline)
    handle = own.transformer.register_forward_hook(lambda *call: computed.append(True))
    options = {"batch_size": 4, "folder": tmp_path, "key": "k"}
    last = last_calls(own, "transformer", calls, **options)
    assert 1 <= last <= min(STEPS, MOST_CALLS)
    assert computed
    computed.clear()
    assert last_calls(own, "transformer", calls, **options) == last
    assert not computed
    handle.remove()


def test_what_cannot_be_learned_is_told(pipeline, tmp_path):
    broken = copy.deepcopy(pipeline)
    broken.transformer.proj_out.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        runs_of(MODEL, broken, tmp_path)
    own = tiny("dit")
    runs = Runs(
        families()["dit"].prompted(own), "transformer", calls_of("dit"), last=1, batch_size=4, folder=tmp_path, key=""
    )
    with pytest.raises(UserError, match="lets no gradients through"):
        runs.error(0)
