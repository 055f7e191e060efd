"""Branches fitted to the codes that calibration solves: by what outputs see, where moments say it."""

import pytest
import torch
from torch import nn

from dmquant.calib.layers.fitting import fit_to_codes, seen_by_output
from dmquant.calib.layers.moments import Moments, columns_of, fit_grid
from dmquant.calib.layers.rounder import Rounder
from dmquant.convert import LayerPlan
from dmquant.layers import QUANTIZED
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.rounding import get_method, gptq
from dmquant.transforms import chains, create
from tests.calib.runs import (
    PART_OF_UNET,
    calibrated,
    captured,
    is_same,
    quantized_layers,
    recipe_of,
    saved_and_loaded,
    stopped_and_resumed,
)

FAST = {"batch_size": 4, "checks": 1}
BY_OUTPUT = {"method": "lowrank", "rank": 2, "by": "output"}
BRIEFLY = BY_OUTPUT | {"iterations": 2}


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"), blocks=2)


def inputs_of(layer, seed=0):
    """Of few directions and noise, the first channels the largest."""
    generator, channels = torch.Generator().manual_seed(seed), layer.weight.shape[1]
    directions = torch.randn(channels // 2, channels, generator=generator)
    x = torch.randn(64, 16, channels // 2, generator=generator) @ directions
    x = (x + 2 * torch.randn(x.shape, generator=generator)) * torch.logspace(0.5, -0.5, channels)
    return x if isinstance(layer, nn.Linear) else x.unflatten(1, (4, 4)).movedim(-1, 1)


def fitted(layer, method, together=8192, split=None, seen=True, **options):
    """The error of the layer's output with its branch and codes, and what quantizes it."""
    spec = WeightSpec.parse("fp4", "group:16", "mse", split=split)
    transforms = create([("lowrank", {"rank": 4, **options})], layer, split)
    step = LayerPlan("layer", spec, None, transforms=transforms)
    quantized = QUANTIZED[type(layer)].like(layer, spec, None, "meta", transforms)
    parts, weight = next(chains(transforms, layer.weight.detach().float(), None))
    quantized.load_parts(parts)
    x, moments = inputs_of(layer), None
    if seen:
        moments = Moments(tuple(layer.weight.shape), spec, torch.device("cpu"), together)
        moments.add(columns_of(layer, x))
    weight = fit_to_codes(step, quantized, weight, moments, get_method(method), gptq.Options())
    grid = fit_grid(weight, step, None)
    values = grid.nearest
    if method == "gptq":
        values = gptq.solve(grid, gptq.factorize(moments.blocks(), gptq.Options()))[0]
    quantized.load_quantized(QuantizedTensor.of(grid, values), layer.bias, None)
    with torch.no_grad():
        return ((quantized(x) - layer(x)).square().mean() / layer(x).square().mean()).item(), quantized


def made(kind):
    torch.manual_seed(0)
    return nn.Linear(96, 64) if kind == "linear" else nn.Conv2d(16, 24, 3, padding=1)


@pytest.mark.parametrize("together", [8192, 64])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_turns_by_the_output_take_a_fifth_off_its_error_and_beat_those_by_the_weight(kind, method, together):
    layer = made(kind)
    without, by_weight, by_output = (
        fitted(layer, method, together, **options)[0] for options in ({"iterations": 0}, {}, {"by": "output"})
    )
    assert by_output < 0.8 * without
    assert by_output < by_weight < without


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_split_input_is_seen_in_the_order_of_its_codes(kind):
    layer = made(kind)
    without, by_output = (
        fitted(layer, "gptq", split=6, **options)[0] for options in ({"iterations": 0}, {"by": "output"})
    )
    assert by_output < 0.8 * without


def test_without_moments_turns_go_by_the_weight():
    layer = made("linear")
    one, other = (fitted(layer, "nearest", seen=False, **options)[1] for options in ({"by": "output"}, {}))
    assert torch.equal(one.qweight, other.qweight)
    assert torch.equal(one.lowrank_up, other.lowrank_up)


@pytest.mark.parametrize("together", [8192, 40])
def test_what_outputs_see_of_an_error_has_the_size_of_the_loss(together):
    layer = made("linear")
    spec = WeightSpec.parse("fp4", "group:16")
    moments = Moments((64, 96), spec, torch.device("cpu"), together)
    x = inputs_of(layer).flatten(0, 1).double()
    x[:, 7] = 0  # a channel that is never used
    moments.sums = moments.sums.double()
    for first in range(0, 96, moments.size):
        block = x[:, first : first + moments.size]
        moments.sums[first // moments.size, : block.shape[1], : block.shape[1]] = block.T @ block
    error = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    error[:, 7] = 0
    seen = seen_by_output(error, gptq.factorize(moments.blocks(), gptq.Options(damping=0.02)))
    expected = 0.0
    for first, block in zip(range(0, 96, moments.size), moments.blocks(), strict=True):
        lost = error[:, first : first + len(block)]
        damped = block + 0.02 * block.diagonal().mean() * torch.eye(len(block))
        expected += ((lost @ damped) * lost).sum().item()
    assert seen.square().sum().item() == pytest.approx(expected, rel=1e-6)


class TestCalibration:
    """On a tiny PixArt-Sigma and a tiny UNet."""

    @pytest.mark.parametrize("rounding", ["nearest", {"method": "gptq", "damping": 0.1}])
    def test_held_out_outputs_gain_and_the_saved_model_is_the_same(self, pixart, tmp_path, rounding):
        settings = {"rounding": rounding, "scale": "mse", "learning": FAST}
        errors = []
        for turns in (0, 10):
            recipe = recipe_of(transforms=[BY_OUTPUT | {"iterations": turns}], **settings)
            backbone, done = calibrated(pixart, recipe, tmp_path / f"{turns}")
            errors.append([task["error"] for block in done.blocks for task in block["tasks"]])
        assert sum(after / before for before, after in zip(*errors, strict=True)) < 0.9 * len(errors[0])
        assert is_same(saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved"), backbone)

    @pytest.mark.parametrize("unit", ["layer", "window"])
    def test_stopped_and_resumed_it_gives_the_same(self, pixart, tmp_path, unit):
        recipe = recipe_of(
            rounding="gptq", scale="lean", activations="fp6",
            transforms=[{"method": "smooth", "alpha": [0.5]}, BRIEFLY], learning=FAST | {"unit": unit},
        )  # fmt: skip
        whole, _ = calibrated(pixart, recipe, tmp_path / "whole")
        resumed, _ = stopped_and_resumed(pixart, recipe, tmp_path / "stopped")
        assert is_same(whole, resumed)

    def test_learned_roundings_take_it_too(self, pixart, tmp_path):
        recipe = recipe_of(activations="fp6", transforms=[BY_OUTPUT], learning=FAST | {"iterations": 4})
        _, done = calibrated(pixart, recipe, tmp_path)
        assert all(task["error"] <= task["nearest_error"] for block in done.blocks for task in block["tasks"])

    def test_convolutions_and_joined_inputs_of_a_unet_take_it(self, tmp_path):
        case = captured("sd15", tmp_path / "data")
        recipe = recipe_of(PART_OF_UNET, keep=False, rounding="gptq", scale="mse", transforms=[BRIEFLY], learning=FAST)
        backbone, done = calibrated(case, recipe, tmp_path / "codes")
        layers = quantized_layers(backbone)
        assert any(isinstance(layer, nn.Conv2d) for layer in layers.values())
        assert all("lowrank" in "".join(layer.part_names) for layer in layers.values())
        assert is_same(saved_and_loaded("sd15", backbone, done.recipe, tmp_path / "saved"), backbone)


def test_moments_are_factorized_once_for_the_branch_and_the_scales(monkeypatch):
    factorized = []
    right = gptq.factorize
    monkeypatch.setattr(gptq, "factorize", lambda *args: factorized.append(args) or right(*args))
    layer, spec = made("linear"), WeightSpec.parse("fp4", "group:16", "lean")
    transforms = create([("lowrank", {"rank": 4, "by": "output", "iterations": 1})], layer, None)
    plan = LayerPlan("layer", spec, None, transforms=transforms)
    quantized = QUANTIZED[nn.Linear].like(layer, spec, None, "meta", transforms)
    moments = Moments((64, 96), spec, torch.device("cpu"), 8192)
    moments.add(columns_of(layer, inputs_of(layer)))
    parts, weight = next(chains(transforms, layer.weight.detach().float(), None))
    quantized.load_parts(parts)
    Rounder(gptq, gptq.Options(), gptq, gptq.Options()).start(layer, plan, quantized, weight, moments)
    assert len(factorized) == 1
