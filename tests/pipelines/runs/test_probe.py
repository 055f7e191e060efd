"""Output errors of layers: exactly zero without quantization, zero before it, and larger the coarser the format."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from dmquant.calib.data.tree import flatten
from dmquant.convert import quantize_
from dmquant.diffusers.families import families
from dmquant.errors import UserError
from dmquant.layers import QUANTIZED
from dmquant.pipelines.runs import probe as probing
from dmquant.pipelines.runs.probe import Probe, layer_names, make_probe, output_errors, sampled_outputs
from dmquant.recipe import Recipe
from tests.calib.runs import call_of
from tests.tiny import TINY

STEPS = 6
MODELS = ("sd15", "pixart-sigma", "dit", "flux")


def probe_of(model, pipeline, **options):
    family = families()[TINY[model].family]
    call = call_of(model, STEPS)
    settings = {"seed": 0, "call": call} | options
    return make_probe(family.prompted(pipeline), family.component, TINY[model].prompts[:2], **settings)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A backbone and its probe; weights that diffusers starts with zeros are drawn."""
    model = request.param
    pipeline = TINY[model].build()
    backbone = getattr(pipeline, families()[TINY[model].family].component)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return backbone, probe_of(model, pipeline)


def quantized(backbone, fmt, keep=()):
    backbone = copy.deepcopy(backbone)
    rules = [{"match": list(keep), "keep": True}] if keep else []
    quantize_(backbone, Recipe.model_validate({"name": "t", "keep": "none", "weights": fmt, "rules": rules}))
    return backbone


def test_the_calls_are_spread_over_the_schedule_and_both_prompts_are_in_them(case):
    backbone, probe = case
    assert len(probe.calls) == 4
    signature = inspect.signature(backbone.forward)
    arguments = [signature.bind(*args, **kwargs).arguments for args, kwargs in probe.calls]
    timesteps = [float(each["timestep"].flatten()[0]) for each in arguments]
    assert timesteps == sorted(set(timesteps), reverse=True)
    rows = 2 if backbone.config.get("guidance_embeds") else 4
    assert all(len(flatten(dict(each))[1][0].tensor) == rows for each in arguments)
    assert set(probe.outputs) == set(layer_names(backbone, QUANTIZED))
    assert all(len(output) <= 4 * probing.SAMPLE for output in probe.outputs.values())


def test_without_quantization_the_same_calls_give_the_same_bits(case):
    backbone, probe = case
    again = sampled_outputs(copy.deepcopy(backbone), probe.calls, layer_names(backbone, QUANTIZED))
    assert list(again) == list(probe.outputs)
    assert all(torch.equal(again[name], output) for name, output in probe.outputs.items())


def test_one_quantized_layer_changes_nothing_before_it_and_itself_and_the_last_layer_after_it(case):
    backbone, probe = case
    order = list(probe.outputs)
    chosen = order[len(order) // 2]
    changed = quantized(backbone, "int2", keep=[name for name in order if name != chosen])
    assert list(output_errors(changed, probe)) == [chosen]
    outputs = sampled_outputs(changed, probe.calls, order)
    same = [torch.equal(outputs[name], probe.outputs[name]) for name in order]
    first = order.index(chosen)
    assert all(same[:first])
    assert not same[first]
    assert not same[-1]
    assert output_errors(changed, probe)[chosen] > 0


def test_every_layer_has_a_larger_error_in_a_coarser_format(case):
    backbone, probe = case
    fine, coarse = (output_errors(quantized(backbone, fmt), probe) for fmt in ("int8", "int3"))
    assert list(fine) == list(coarse) == list(probe.outputs)
    assert all(0 < fine[name] < coarse[name] for name in fine)
    assert max(fine.values()) < 1e-2


def test_the_error_is_that_of_whole_outputs_where_these_are_small(case):
    backbone, probe = case
    changed = quantized(backbone, "int4")
    name = next(name for name, output in probe.outputs.items() if len(output) < probing.SAMPLE)
    assert len(probe.outputs[name]) == whole(backbone, probe, name).numel()
    exact, got = whole(backbone, probe, name).double(), whole(changed, probe, name).double()
    expected = float((got - exact).square().sum() / exact.square().sum())
    assert output_errors(changed, probe)[name] == pytest.approx(expected, rel=1e-9)


def whole(backbone, probe, name):
    """Everything that a layer gives in the calls of a probe."""
    outputs = []
    handle = backbone.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.inference_mode():
        for args, kwargs in probe.calls:
            backbone(*args, **kwargs)
    handle.remove()
    return torch.cat([output.flatten() for output in outputs])


def test_a_probe_comes_back_from_disk_bit_for_bit(case, tmp_path):
    backbone, probe = case
    probe.save(tmp_path / "fp.safetensors", "key")
    loaded = Probe.load(tmp_path / "fp.safetensors", "key")
    assert list(loaded.outputs) == list(probe.outputs)
    changed = quantized(backbone, "int4")
    assert output_errors(changed, loaded) == output_errors(changed, probe)


def small(**outputs):
    return Probe([((torch.ones(1, 4),), {})], {name: torch.as_tensor(values) for name, values in outputs.items()})


def test_an_absent_foreign_or_damaged_file_is_no_probe(tmp_path):
    path = tmp_path / "probe" / "fp.safetensors"
    assert Probe.load(path, "key") is None
    small(layer=[1.0]).save(path, "key")
    assert Probe.load(path, "key") is not None
    assert Probe.load(path, "other") is None
    content = path.read_bytes()
    damages = [content[:-1], content[:20], content.replace(b"argument.0", b"argument.x"), b"", b"{}" * 50]
    for position in range(0, len(content), 7):
        damages.append(bytearray(content))
        damages[-1][position] ^= 4
    for damaged in damages:
        path.write_bytes(damaged)
        assert Probe.load(path, "key") is None


def summing(count):
    """A chain of quantized Linear layers, each of which gives the sum of its four inputs four times."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    for layer in layers:
        nn.init.ones_(layer.weight)
    return quantized(layers, "int8")


def test_layers_whose_error_is_no_number_have_none():
    backbone = summing(4)
    of_ones = [4.0] * 4
    probe = small(**{"0": [2.0] * 4, "1": [0.0] * 4, "2": [float("nan")] * 4, "3": [float("inf")] * 4})
    assert output_errors(backbone, probe) == {"0": pytest.approx(1.0, rel=1e-3), "1": None, "2": None, "3": None}
    assert output_errors(backbone, small(**{"0": of_ones}))["1"] is None


def test_a_layer_that_is_never_reached_comes_last_and_has_no_error():
    backbone = summing(2)
    backbone.forward = functools.partial(lambda layer, x: layer(x), backbone[1])
    errors = output_errors(backbone, small(**{"1": [2.0] * 4}))
    assert errors == {"1": pytest.approx(1.0, rel=1e-3), "0": None}
    assert list(errors) == ["1", "0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_output_is_sampled_at_as_many_spread_positions(dtype):
    layer = nn.Conv2d(1, 3, 1).to(dtype)
    call = ((torch.arange(400 * 400, dtype=torch.float32).view(1, 1, 400, 400).to(dtype),), {})
    one, other = (sampled_outputs(nn.Sequential(layer), [call], ["0"])["0"] for _ in range(2))
    assert one.dtype == dtype
    assert one.shape == (probing.SAMPLE,)
    assert torch.equal(one, other)
    positions = probing._positions(3 * 400 * 400)
    with torch.inference_mode():
        assert torch.equal(one, layer(call[0][0]).flatten()[positions])
    gaps = positions.diff()
    assert gaps.min() > 0
    assert gaps.max() <= 2 * 3 * 400 * 400 / probing.SAMPLE + 1


@pytest.mark.parametrize(
    ("steps", "chosen"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (20, [0, 6, 13, 19])]
)
def test_first_last_and_two_steps_between_are_chosen(steps, chosen):
    assert probing._spread(steps) == chosen


def test_every_step_and_repeated_call_is_told():
    told = []
    probe_of("pixart-sigma", TINY["pixart-sigma"].build(), progress=lambda *step: told.append(step))
    assert told == [(done, STEPS + 4) for done in range(1, STEPS + 5)]


class TwoCallsAStep:
    """A pipeline that calls its backbone once with the prompt and once without, as newer ones do."""

    def __init__(self, backbone, steps):
        self.transformer, self.scheduler, self.steps = backbone, self, steps
        self.config, self.timesteps = None, []

    def set_timesteps(self, steps):
        self.timesteps = list(range(steps, 0, -1))

    def set_progress_bar_config(self, **config): ...

    def step(self, model_output, timestep, sample):
        return (sample + model_output,)

    def __call__(self, prompt, num_inference_steps, **call):
        self.set_timesteps(num_inference_steps)
        latents = torch.zeros(len(prompt), 4)
        for timestep in self.timesteps:
            for guided in (1.0, 0.0)[: self.steps]:
                noise = self.transformer(torch.full((len(prompt), 4), timestep + guided / 2))
            latents = self.step(noise if self.steps else latents, timestep, latents)[0]
        return type("Output", (), {"images": latents})


def test_a_pipeline_that_calls_its_backbone_twice_a_step_is_probed_over_the_whole_schedule():
    pipeline = TwoCallsAStep(nn.Sequential(nn.Linear(4, 4)), 2)
    probe = make_probe(pipeline, "transformer", ["a"], seed=0, call={"num_inference_steps": 20})
    assert [float(args[0][0, 0]) for args, _ in probe.calls] == [20.5, 14.5, 7.5, 1.5]


def test_a_backbone_that_is_never_called_is_said():
    pipeline = TwoCallsAStep(nn.Sequential(nn.Linear(4, 4)), 0)
    with pytest.raises(UserError, match="never called its Sequential"):
        make_probe(pipeline, "transformer", ["a"], seed=0, call={"num_inference_steps": 3})


def test_a_pipeline_whose_call_takes_no_steps_is_said():
    with pytest.raises(UserError, match="takes no num_inference_steps"):
        make_probe(object(), "transformer", ["a"], seed=0, call={})
