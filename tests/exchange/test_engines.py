"""Engines: inputs rounded by their rules' definition, what they run, and recipes that keep what they cannot take."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.convert import plan, quantize_, unmatched
from dmquant.errors import UsageError
from dmquant.exchange.engines import engines
from dmquant.exchange.formats import formats
from dmquant.formats import get_format
from dmquant.kernels import KERNELS
from dmquant.models import completed
from dmquant.pipelines.runs.defaults import ENGINES, EXPORTS, named_recipe
from dmquant.recipe import Recipe

E2M1, E4M3 = get_format("fp4"), get_format("fp8")
BLOCK = st.lists(st.floats(-3e4, 3e4, width=32), min_size=32, max_size=32)


def nearest(value: Fraction, fmt) -> float:
    """The value of a format nearest to an exact number, saturating, ties to the even code."""
    values = [float(one) for one in fmt.values if torch.isfinite(one)]
    distances = [abs(Fraction(one) - value) for one in values]
    closest = [one for one, distance in zip(values, distances, strict=True) if distance == min(distances)]
    return min(closest, key=lambda one: int(fmt.encode(torch.tensor(one))) & 1)


def rounded(x, engine, *spec, base=None, **settings):
    return fake_quantize(x, ActivationSpec.parse(*spec, engine=engine, **settings), -1, base)


@settings(deadline=None, max_examples=10)
@given(BLOCK, st.floats(2**-10, 64, width=32))
def test_nvfp4_is_each_engines_definition(block, base):
    """Scales in E4M3 of the largest over 6 and the base, held above what the engine holds them; then E2M1."""
    x, given = torch.tensor([block]), torch.tensor(base)
    for engine, least in (("comfyui", 0.0), ("torchao", 2.0**-6), ("modelopt", 2.0**-9)):
        made = rounded(x, engine, "nvfp4", base=given, scale="static:1")
        for values, theirs in zip(x.view(2, 16), made.view(2, 16), strict=True):
            wanted = (values.abs().max() / 6 / given).clamp(min=least, max=448)
            scale = nearest(Fraction(float(wanted)), E4M3) * given
            for value, their in zip(values, theirs, strict=True):
                if not scale:
                    assert their == 0
                    continue
                exact = Fraction(float(value)) / Fraction(float(scale))
                below, above = (nearest(exact * (1 + side * Fraction(1, 2**21)), E2M1) * scale for side in (-1, 1))
                assert min(below, above) <= their <= max(below, above)


@settings(deadline=None, max_examples=50)
@given(BLOCK)
def test_mx_takes_the_smallest_power_of_two_that_clips_nothing(block):
    x = torch.tensor([block])
    for name, fmt in (("mxfp8", E4M3), ("mxfp4", E2M1)):
        made = rounded(x, "torchao", name)
        scale = 2.0**-126
        while scale * fmt.max < x.abs().max():
            scale *= 2
        assert torch.equal(made, fmt.round(x / scale) * scale)
        assert made.abs().max() <= scale * fmt.max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_input_of_an_engine_keeps_shape_dtype_zeros_and_sign(engine, dtype):
    x = torch.randn(2, 5, 64).to(dtype)
    x[0, 1] = 0
    for spec, _ in engines()[engine].inputs:
        scale = None if spec.ranges is None else torch.tensor(0.01 if spec.static_base else 0.05).view(1, 1, 1)
        made = fake_quantize(x, engines()[engine].taking(spec), -1, scale)
        assert (made.shape, made.dtype) == (x.shape, dtype)
        assert not made[0, 1].any()
        assert (made * x >= 0).all()
        assert torch.equal(fake_quantize(torch.zeros_like(x), engines()[engine].taking(spec), -1, scale), x * 0)
        assert (made - x).abs().max() < 0.2 * x.abs().max()


@pytest.mark.parametrize("engine", ENGINES)
def test_all_formats_that_an_engine_runs_make_a_recipe_whose_layers_it_takes(engine):
    layer = nn.Sequential(nn.Linear(128, 128))
    recipe = Recipe.load(named_recipe(None, engine))
    assert recipe.engine == engine
    for weights, inputs in engines()[engine].formats:
        made = recipe.in_formats(weights, inputs)
        (step,) = plan(layer, made)
        assert (made.weights, made.activations) == (weights, inputs)
        assert step.activations is None or step.activations.engine.name == engine
    own = next(iter(engines()[engine].formats))
    assert recipe.in_formats(*own).model_dump() == recipe.model_dump()


def test_other_formats_are_refused_in_a_line_that_lists_those_it_runs():
    recipe = Recipe.load("for-torchao")
    with pytest.raises(UsageError, match=r"torchao runs no .*fp6_e2m3.*it runs nvfp4 with nvfp4, nvfp4 with none"):
        recipe.in_formats(None, "fp6")
    with pytest.raises(UsageError, match=r"takes no inputs in fp6.*it takes"):
        ActivationSpec.parse("fp6", engine="comfyui")
    with pytest.raises(UsageError, match=r"engine.*did you mean 'comfyui'"):
        recipe.with_settings(engine="comfyu")
    with pytest.raises(UsageError, match="leave out candidates"):
        recipe.with_settings(candidates=["fp4", "fp4_e1m2"])
    assert recipe.in_formats("int8", None).activations == "int8"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.narrow, self.wide = nn.Conv2d(32, 32, 1), nn.Linear(24, 32), nn.Linear(64, 64)


def refusing(monkeypatch, engine):
    """A format of the engine that takes linear layers of multiples of 16 alone."""

    def refuses(layer, weights, activations):
        if isinstance(layer, nn.Conv2d):
            return "it takes no convolutions"
        return "columns are no multiple of 16" if layer.in_features % 16 else None

    found = dict(formats())
    known = found.get(engine)
    made = replace(known, refuses=refuses) if known else type("Format", (), {"refuses": staticmethod(refuses)})()
    monkeypatch.setattr("dmquant.exchange.formats.formats", lambda: found | {engine: made})


def test_layers_that_an_engine_refuses_stay_in_high_precision_and_the_rules_say_why(monkeypatch):
    refusing(monkeypatch, "torchao")
    recipe = completed(Recipe.load("for-torchao").with_settings(rounding={"method": "nearest"}, scale="mse"), Net())
    reasons = {rule.reason: rule.match for rule in recipe.rules if rule.reason}
    assert reasons == {"it takes no convolutions": ["conv"], "columns are no multiple of 16": ["narrow"]}
    assert [step.name for step in plan(Net(), recipe)] == ["wide"]
    assert completed(recipe, Net()) is recipe
    assert unmatched(Net(), recipe) is None
    assert plan(Net(), Recipe.from_dict(recipe.to_dict(), "config.json")) == plan(Net(), recipe)
    taken_back = recipe.with_settings(keep="family", rules=[{"match": "narrow", "keep": False}])
    assert "narrow" in [step.name for step in plan(Net(), taken_back)]


def test_a_layer_for_an_engine_rounds_its_input_so_and_runs_by_kernels_that_leave_that_to_the_definition():
    net = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    recipe = Recipe.load("for-torchao").with_settings(rounding={"method": "nearest"}, scale="absmax")
    quantize_(net, recipe)
    x = torch.randn(3, 64).bfloat16()
    assert "torchao" in repr(net)
    assert torch.equal(net[0].quantize_input(x), rounded(x, "torchao", "nvfp4"))
    for name in ("integer", "cuda-int8", "cuda-fp8", "cuda-nvfp4"):
        assert KERNELS[name].refuses(net[0], torch.device("cpu"))


def test_every_engine_can_be_exported_to():
    assert set(ENGINES) == set(EXPORTS) == set(engines())
