"""Calibration of every family: all layers that are not kept are quantized, none worse than by nearest rounding."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from dmquant.calib.data.tree import in_own_containers
from dmquant.convert import quantize_
from dmquant.diffusers.families import families
from dmquant.recipe import Recipe
from tests.calib.runs import calibrated, captured, quantized_layers, recipe_of
from tests.tiny import TINY, marked
from tests.tiny.imaged import IMAGED

BY_DATA = {"candidates": ["fp4_e2m1", "fp4_e1m2"], "scale": "hessian"}
SETTINGS = {"sd15": BY_DATA, "hunyuan-1.2": BY_DATA}
CALIBRATED = ("sd15 control", "flux control", "hunyuan-1.2 control", "flux-kontext", "qwenimage-edit-2511")
"""Of the pipelines that take images: what their backbones are given is more than others are."""
LEARNING = {"iterations": 8, "checks": 2, "batch_size": 6, "learning_rate": 0.05}


@pytest.fixture(scope="module", params=[*marked(), *marked(CALIBRATED)])
def done(request, tmp_path_factory):
    """Family, what was captured, and what calibration made of it; two have their scales and formats chosen by data."""
    folder = tmp_path_factory.mktemp(request.param)
    case, family = captured(request.param, folder / "data"), families()[(TINY | IMAGED)[request.param].family]
    recipe = recipe_of(keep=False, activations="fp8", learning=LEARNING, **SETTINGS.get(request.param, {}))
    recipe = recipe.keeping(family.keep).splitting(family.concatenations(case[0]))
    return family, case, *calibrated(case, recipe, folder, counted=family.counted(case[0]))


def test_every_layer_is_quantized_or_kept_with_a_reason(done):
    family, (exact, *_), backbone, calibration = done
    layers = {name for name, layer in exact.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    kept = {name for name in layers if any(fnmatchcase(name, glob) for glob in family.keep)}
    assert quantized_layers(backbone).keys() == layers - kept
    assert {layer.plan.name for layer in calibration.layers} == layers - kept


def test_no_unit_is_worse_than_by_nearest_rounding(done):
    *_, calibration = done
    tasks = [task for block in calibration.blocks for task in block["tasks"]]
    assert all(0 < task["error"] <= task["nearest_error"] for task in tasks)
    assert any(task["error"] < task["nearest_error"] for task in tasks)


def test_the_backbone_says_what_full_precision_says_but_for_rounding(done):
    _, (exact, _, store), backbone, _ = done
    _, kwargs = store.batch([index for index, sample in enumerate(store.samples) if sample.held_out])
    with torch.no_grad():
        wanted, given = (each(**in_own_containers(kwargs))[0] for each in (exact, backbone))
    assert 0 < (given - wanted).square().mean() < 0.3 * wanted.var()


def test_the_recipe_that_comes_back_gives_the_same_layers_without_data(done):
    """Formats and splits that were chosen for this backbone stand in it by name."""
    _, (exact, *_), backbone, calibration = done
    again = copy.deepcopy(exact)
    plain = calibration.recipe.with_settings(rounding="nearest", scale="absmax")
    quantize_(again, Recipe.model_validate(plain.model_dump()))
    specs = {name: layer.weight_spec.fmt.name for name, layer in quantized_layers(backbone).items()}
    assert {name: layer.weight_spec.fmt.name for name, layer in quantized_layers(again).items()} == specs
    shapes = {name: layer.scale.shape for name, layer in quantized_layers(backbone).items()}
    assert {name: layer.scale.shape for name, layer in quantized_layers(again).items()} == shapes
