"""The options of layers, and the bytes that they are said to take."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmquant.calib.choice.options import options_of, plans_by_option, stored_bytes
from dmquant.calib.choice.solving import empty_moments, quick, solve
from dmquant.calib.layers.rounder import Rounder
from dmquant.errors import UsageError
from dmquant.layers import quantize_layer
from dmquant.pipelines.runs.footprint import footprint
from dmquant.recipe import Recipe


def options(source="default", **settings):
    recipe = Recipe.load(source).with_settings(keep="none", **settings)
    return recipe, options_of(recipe)


@pytest.mark.parametrize("source", ["default", "rtn", "thorough", "small", "default-lowrank"])
def test_sizes_are_those_of_quantized_layers(source):
    recipe, of_layers = options(source)
    layers = {"0": nn.Linear(48, 32), "1": nn.Conv2d(16, 24, 3), "2": nn.Linear(20, 5)}
    for name, of_layer in plans_by_option(nn.Sequential(*layers.values()), quick(recipe), of_layers).items():
        for option, step in of_layer.items():
            spec = replace(step.weights, scale="mse")
            quantized = nn.Sequential(quantize_layer(layers[name], spec, None, transforms=step.transforms))
            assert footprint(quantized).quantized_bytes == stored_bytes(step, layers[name].weight.shape), option


def test_the_recipes_own_weights_come_first_and_no_option_twice():
    of_layers = options()[1]
    assert of_layers[0].name == "fp4_e2m1 group:16"
    names = [one.name for one in of_layers]
    assert len(set(names)) == len(names)
    assert options("thorough")[1][0].name == "nl4 group:16"


def test_options_reach_from_three_to_eight_bits():
    whole = nn.Sequential(nn.Linear(256, 256))
    recipe, of_layers = options()
    plans = plans_by_option(whole, recipe, of_layers)["0"]
    bits = sorted(8 * stored_bytes(step, (256, 256)) / 256**2 for step in plans.values())
    assert bits[0] == pytest.approx(3.25, abs=0.01)
    assert bits[-1] == pytest.approx(8.125, abs=0.01)
    assert any(abs(one - 4.03) < 0.02 for one in bits)
    assert any(abs(one - 5.03) < 0.02 for one in bits)


def test_formats_to_choose_among_can_be_named():
    recipe = Recipe.load("default")
    found = options_of(recipe, ["fp4_e2m1", "fp6_e2m3"])
    assert {one.name for one in found} == {"fp4_e2m1 group:16", "fp4_e2m1 channel", "fp6_e2m3 group:32"}
    with pytest.raises(UsageError, match="nothing to choose from with fp6_e2m3: name two formats"):
        options_of(recipe, ["fp6_e2m3"])


def test_an_engine_has_the_weights_that_it_runs_with_their_inputs():
    found = options_of(Recipe.load("for-comfyui"))
    settings = {one.name: dict(one.settings) for one in found}
    assert "int8 channel" in settings
    assert settings["int8 channel"]["activations"] == "int8"
    assert len(found) > 3


def test_a_low_rank_branch_is_chosen_with_its_rank_or_left_out():
    found = options_of(Recipe.load("default-lowrank"))
    ranks = {one.name: [each["rank"] for each in one.settings.get("transforms", ()) if "rank" in each] for one in found}
    assert found[0].name == "fp4_e2m1 group:16 rank:16"
    assert ranks["fp4_e2m1 group:16 rank:8"] == [8]
    assert ranks["fp4_e2m1 group:16 rank:32"] == [32]
    assert ranks["fp4_e2m1 group:16"] == []
    assert found[[one.name for one in found].index("fp4_e2m1 group:16")].settings["transforms"] == []


def test_errors_of_outputs_fall_with_bits_and_are_those_of_the_weights():
    torch.manual_seed(0)
    layer, recipe = nn.Linear(64, 32), quick(Recipe.load("default").with_settings(keep="none"))
    whole, of_layers = nn.Sequential(layer), options_of(recipe)
    plans = plans_by_option(whole, recipe, of_layers)["0"]
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    moments = empty_moments(layer, plans, torch.device("cpu"))
    moments.add(x)
    solved = solve(layer, plans, Rounder.of(recipe), moments)
    for option, one in solved.items():
        change = one.float_weight(layer, plans[option]) - layer.weight.detach()
        wanted = (x @ change.T).square().sum(1).mean().item()
        assert one.error == pytest.approx(wanted, rel=1e-3)
    assert solved["fp8_e4m3 group:64"].error < solved["fp5_e2m2 group:32"].error < solved["fp4_e2m1 group:16"].error
    assert solved["fp4_e2m1 group:16"].error < solved["nl3 group:16"].error < solved["nl3 group:32"].error
