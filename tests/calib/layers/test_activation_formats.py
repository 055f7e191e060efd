"""The format of a layer's input is the one whose rounding disturbs the output least."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.calib.blocks import input_specs
from dmquant.calib.layers.activation_formats import choose_activation_formats
from dmquant.convert import LayerPlan, plan
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from tests.calib.layers.test_ranges import Backbone, Store
from tests.calib.runs import calibrated, captured, is_same, quantized_layers, recipe_of, saved_and_loaded

CANDIDATES = tuple(map(get_format, ("fp6_e2m3", "fp6_e3m2", "fp6_e4m1")))
NAMES = [fmt.name for fmt in CANDIDATES]


def plans_of(layers, granularity="token", scale="online"):
    spec = ActivationSpec.parse("fp6", granularity, scale=scale)
    weights = WeightSpec.parse("fp4", "channel")
    return {name: LayerPlan(name, weights, spec, activation_candidates=CANDIDATES) for name in layers}


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_it_is_the_format_of_least_output_error_over_every_row_alike(spread):
    torch.manual_seed(0)
    backbone, store = Backbone().requires_grad_(False), Store([0, 1, 2, 3, 1, 2], held_out=(5,))
    backbone.conv.weight *= torch.exp(spread * torch.randn(8)).view(-1, 1, 1, 1)
    seen = {"conv": [], "linear": []}
    hooks = [
        getattr(backbone, name).register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(args[0]))
        for name in seen
    ]
    for index in range(5):
        args, kwargs = store.batch([index], torch.device("cpu"))
        backbone(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    plans = plans_of(seen)
    chosen = choose_activation_formats(backbone, plans, store, batch_size=2)
    for name, inputs in seen.items():
        layer, dim = getattr(backbone, name), -3 if name == "conv" else -1
        errors = []
        for fmt in CANDIDATES:
            spec, error = replace(plans[name].activations, fmt=fmt), 0.0
            for row in torch.cat(inputs):
                lost = layer(fake_quantize(row[None], spec, dim)) - layer(row[None])
                error += (lost.square().mean() / row.square().mean()).item()
            errors.append(error)
        assert chosen[name] == CANDIDATES[errors.index(min(errors))]
    assert choose_activation_formats(backbone, plans_of(["idle"]), store, 2)["idle"] == CANDIDATES[0]


@pytest.mark.parametrize(
    ("granularity", "scale"), [("token", "online"), ("tensor", "static:1"), ("tensor", "static:2")]
)
@pytest.mark.parametrize("model", ["pixart-sigma"])
def test_calibrated_models_name_the_formats_and_are_read_back(model, granularity, scale, tmp_path, monkeypatch):
    case = captured(model, tmp_path / "data")
    recipe = recipe_of(
        activations="fp6",
        activation_candidates=NAMES,
        activation_granularity=granularity,
        activation_scale=scale,
        candidates=["fp4_e2m1", "fp4_e1m2"],
        granularity="tensor",
        scale="hessian",
        rules=[{"match": "transformer_blocks.0.*", "activations": "none"}],
    )
    assert recipe.calibrated
    backbone, done = calibrated(case, recipe, tmp_path / "out")
    monkeypatch.setattr(input_specs, "choose_activation_formats", None)  # what was chosen is on disk
    again = calibrated(case, recipe, tmp_path / "out")
    assert is_same(again[0], backbone)
    assert again[1].recipe == done.recipe
    layers = quantized_layers(backbone)
    chosen = {name: layer.activations and layer.activations.fmt.name for name, layer in layers.items()}
    assert {fmt for name, fmt in chosen.items() if name.startswith("transformer_blocks.0.")} == {None}
    assert {fmt for fmt in chosen.values() if fmt} <= set(NAMES)
    planned = {step.name: step for step in plan(case[0], done.recipe)}
    assert {name: step.activations and step.activations.fmt.name for name, step in planned.items()} == chosen
    assert not any(step.candidates or step.activation_candidates for step in planned.values())
    read = saved_and_loaded(model, backbone, done.recipe, tmp_path / "saved")
    assert is_same(read, backbone)
    for name, layer in quantized_layers(read).items():
        assert layer.activations == layers[name].activations


def test_another_format_on_the_command_line_drops_the_candidates():
    assert Recipe.load("fpsearch").activation_candidates == ["fp6_e2m3", "fp6_e3m2"]
    assert Recipe.load("fpsearch", a="fp8").activation_candidates is None
    assert Recipe.load("fpsearch", a="fp8").candidates is not None


def test_candidates_of_unlike_size_are_refused():
    with pytest.raises(UsageError, match="candidates differ in bits"):
        Recipe.load("rtn").with_settings(activation_candidates=["fp6", "fp8"])


def test_layers_are_themselves_again_afterwards():
    backbone = Backbone()
    choose_activation_formats(backbone, plans_of(["conv"]), Store([0, 1]), 2)
    assert not backbone.conv._forward_pre_hooks
    assert isinstance(backbone.conv, nn.Conv2d)
