"""Transforms in calibration: fitted to data, kept where they help, written to disk, saved with the model."""

import copy
import signal
import sys

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec, TimestepRanges
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.fitting import fit_transforms
from dmquant.calib.layers.statistics import InputObserver
from dmquant.convert import LayerPlan
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.diffusers.timesteps import share_timesteps
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.pipelines.runs.footprint import footprint
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.transforms import InputStatistics, bias, create
from tests.calib.runs import (
    PART_OF_UNET,
    calibrated,
    captured,
    is_same,
    packed,
    quantized_layers,
    recipe_of,
    saved_and_loaded,
    stopped_and_resumed,
)
from tests.forked import Forked

TWO_ALPHAS = {"method": "smooth", "alpha": [0.4, 0.8]}  # of ten, each tried with all that follows
ALL = [
    "equalize",
    TWO_ALPHAS,
    {"method": "rotate", "size": 8},
    "outliers",
    {"method": "lowrank", "rank": 2, "iterations": 2},
    {"method": "bias", "ranges": 2},
]
SETTINGS = {
    "smooth": ["smooth"],
    "lqer": [{"method": "lowrank", "rank": 4, "of": "error"}],
    "bias": ["bias"],
    "all": ALL,
}
FAST = {"iterations": 4, "batch_size": 4, "checks": 1}


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"), blocks=2)


def samples(case, held_out):
    _, _, store = case
    indices = [index for index, sample in enumerate(store.samples) if sample.held_out == held_out]
    return store.batch(indices)[1]


def error_of(case, backbone):
    kwargs = samples(case, held_out=True)
    with torch.no_grad():
        return (backbone(**kwargs)[0] - case[0](**kwargs)[0]).square().mean().item()


@pytest.mark.parametrize(
    ("name", "rounding"),
    [("smooth", "nearest"), ("lqer", "nearest"), ("bias", "adaround"), ("all", "nearest"), ("all", "adaround")],
)
def test_saved_models_compute_the_same_and_tell_their_size(pixart, tmp_path, name, rounding):
    recipe = recipe_of(transforms=SETTINGS[name], rounding=rounding, activations="fp6", learning=FAST, scale="hessian")
    backbone, done = calibrated(pixart, recipe, tmp_path / "codes")
    for block in done.blocks:
        for task in block["tasks"]:
            assert 0 < task["error"] <= task["nearest_error"]
    loaded = saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved")
    assert is_same(loaded, backbone)
    kwargs = samples(pixart, held_out=True)
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], backbone(**kwargs)[0])
    stored = sum(tensor.nbytes for name, tensor in packed(backbone).items() if not name.endswith("input_scale"))
    assert footprint(loaded).quantized_bytes == stored


@pytest.mark.parametrize(("unit", "dtype"), [("layer", "fp32"), ("window", "bf16")])
def test_all_units_take_all_transforms_and_repeat(pixart, tmp_path, unit, dtype):
    learning = FAST | {"unit": unit, "dtype": dtype, "iterations": 2}
    recipe = recipe_of(transforms=ALL, activations="fp8", learning=learning, keep=False)
    first, _ = calibrated(pixart, recipe, tmp_path / "first")
    again, done = calibrated(pixart, recipe, tmp_path / "again")
    assert is_same(first, again)
    assert len(done.layers) == len(quantized_layers(again))


def test_static_activations_go_with_what_leaves_the_input_alone(pixart, tmp_path):
    transforms = ["outliers", {"method": "lowrank", "rank": 2, "of": "error"}, {"method": "bias", "ranges": 3}]
    static = {"activation_scale": "static:2", "activation_granularity": "tensor"}
    recipe = recipe_of(transforms=transforms, activations="fp8", rounding="nearest", learning=FAST, **static)
    backbone, done = calibrated(pixart, recipe, tmp_path / "codes")
    assert any(block["tasks"][0]["error"] < block["tasks"][0]["nearest_error"] for block in done.blocks)
    loaded = saved_and_loaded("pixart-sigma", backbone, done.recipe, tmp_path / "saved")
    kwargs = samples(pixart, held_out=True)
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], backbone(**kwargs)[0])


def test_interrupted_and_run_again_it_gives_the_parts_of_an_uninterrupted_run(pixart, tmp_path):
    recipe = recipe_of(transforms=ALL, activations="fp6", learning=FAST)
    whole, reports = calibrated(pixart, recipe, tmp_path / "whole")
    resumed, again = stopped_and_resumed(pixart, recipe, tmp_path / "stopped")
    assert is_same(resumed, whole)
    assert [layer.error for layer in again.layers] == [layer.error for layer in reports.layers]


def test_convolutions_of_a_unet_take_them_too(tmp_path):
    case = captured("sd15", tmp_path / "data")
    recipe = recipe_of(
        transforms=["equalize", "rotate", "outliers", {"method": "lowrank", "rank": 2, "of": "error"}, "bias"],
        activations="fp6",
        rounding="nearest",
        keep=False,
        rules=PART_OF_UNET[:2],
        learning=FAST,
    )
    backbone, done = calibrated(case, recipe, tmp_path / "codes")
    assert any(isinstance(layer, nn.Conv2d) for layer in quantized_layers(backbone).values())
    assert all(layer.error < 0.05 for layer in done.layers)


class TestSmooth:
    """How alpha is chosen."""

    def test_inputs_with_outlier_channels_are_smoothed_and_the_output_gains(self, pixart, tmp_path):
        backbone, blocks, store = copy.deepcopy(pixart[0]), *pixart[1:]
        block = backbone.transformer_blocks[1].ff
        with torch.no_grad():  # two hidden channels a hundred times as large, in whose weights nothing is lost
            block.net[0].proj.weight[[3, 20]] *= 100
            block.net[0].proj.bias[[3, 20]] *= 100
        case = (backbone, blocks, store)
        rules = [{"match": "*", "keep": True}, {"match": "transformer_blocks.1.ff.net.2", "keep": False}]
        settings = {
            "rounding": "nearest", "weights": "int8", "activations": "int8", "activation_granularity": "tensor",
            "rules": rules, "learning": FAST,
        }  # fmt: skip
        plain, _ = calibrated(case, recipe_of(**settings), tmp_path / "plain")
        smooth, _ = calibrated(case, recipe_of(**settings, transforms=["smooth"]), tmp_path / "smooth")
        layer = smooth.transformer_blocks[1].ff.net[2]
        factor = layer.parts(layer.transforms[0])["factor"].float().flatten()
        others = torch.ones(len(factor), dtype=torch.bool).index_fill(0, torch.tensor([3, 20]), False)
        assert factor[[3, 20]].max() < factor[others].min()
        assert error_of(case, smooth) < 0.5 * error_of(case, plain)

    def test_without_gain_on_the_sample_the_layer_stays_as_it_is(self):
        """A maximum that one sample alone had, and a weight whose scale it would spoil."""
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 32), torch.randn(100, 64)
        transforms = create([("smooth", {"alpha": [0.5, 0.9]})], layer, None)
        step = LayerPlan("layer", WeightSpec.parse("int4", "channel"), None, transforms=transforms)
        quantized = QuantLinear.like(layer, step.weights, None, "meta", transforms)
        rare = x.abs().amax(0).index_fill(0, torch.tensor([7]), 1e4)
        weight = fit_transforms(layer, step, quantized, InputStatistics(rare.unsqueeze(0), [x]))
        assert torch.equal(weight, layer.weight)
        assert (quantized.parts(transforms[0])["factor"] == 1).all()

    def observed(self, kind, count, calls):
        """Statistics of a layer of four channels over `calls`: pairs of timesteps of the rows and the input."""
        layer = nn.Linear(4, 3) if kind is QuantLinear else nn.Conv2d(4, 3, 1)
        transforms = create([("smooth", {"ranges": count})], layer, None)
        quantized = kind.like(layer, WeightSpec.parse("int4", "channel"), None, "meta", transforms)
        quantized.timestep_ranges = TimestepRanges({count})
        observer = InputObserver(quantized, len(calls))
        for timesteps, x in calls:
            quantized.timestep_ranges.set(torch.tensor(timesteps))
            observer.add(x)
        return observer.statistics()

    @pytest.mark.parametrize("kind", [QuantLinear, QuantConv2d])
    def test_maxima_are_told_apart_by_the_timestep_of_each_row(self, kind):
        torch.manual_seed(0)
        x = torch.randn(4, 7, 4) if kind is QuantLinear else torch.randn(4, 4, 3, 3)
        channels = x if kind is QuantLinear else x.flatten(2).mT
        calls = [([10.0, 990.0], x[:2]), ([600.0, 20.0], x[2:])]
        largest = channels.abs().amax(1)  # by row; ranges of four: 0 3 2 0
        expected = torch.stack([largest[[0, 3]].amax(0), largest[0], largest[2], largest[1]])
        expected[1] = expected[0]  # no sample: the nearest that has some, of two the lower
        assert torch.equal(self.observed(kind, 4, calls).absmax, expected)
        assert torch.equal(self.observed(kind, 1, calls).absmax, largest.amax(0, keepdim=True))

    def test_an_outlier_of_one_range_alone_does_not_decide_for_the_others(self):
        """Channel 9 is large at all times; channel 5 in one token of the first range, where it would spoil weights."""
        torch.manual_seed(0)
        layer, rows = nn.Linear(64, 32), torch.randn(8, 50, 64)
        rows[..., 9] *= 30
        rows[0, 0, 5] = 300
        calls = [([timestep], rows[number : number + 1]) for number, timestep in enumerate((10.0, *[900.0] * 7))]
        int4 = ActivationSpec.parse("int4", "token")
        errors, maxima = {}, None
        for ranges in (1, 2):
            transforms = create([("smooth", {"ranges": ranges})], layer, None)
            step = LayerPlan("layer", WeightSpec.parse("int4", "channel"), int4, transforms=transforms)
            quantized = QuantLinear.like(layer, step.weights, int4, "meta", transforms)
            quantized.timestep_ranges = TimestepRanges({ranges})
            observer = InputObserver(quantized, len(calls))
            for timesteps, x in calls:
                quantized.timestep_ranges.set(torch.tensor(timesteps))
                observer.add(x)
            statistics = observer.statistics()
            weight = fit_transforms(layer, step, quantized, statistics)
            quantized.load_quantized(quantize_tensor(weight, "int4", "channel"), layer.bias)
            with torch.no_grad():
                errors[ranges] = sum((quantized(x) - layer(x)).square().sum().item() for _, x in calls)
            maxima = statistics.absmax
        assert maxima[0, 5] == 300
        assert maxima[1, 5] < 10
        assert errors[2] < 0.7 * errors[1]

    def test_ranges_change_nothing_that_is_stored(self, pixart, tmp_path):
        settings = {"activations": "fp6", "rounding": "nearest", "learning": FAST}
        recipe = recipe_of(transforms=[TWO_ALPHAS | {"ranges": 3}], **settings)
        backbone, done = calibrated(pixart, recipe, tmp_path / "three")
        plain, _ = calibrated(pixart, recipe_of(transforms=[TWO_ALPHAS], **settings), tmp_path / "one")
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in packed(backbone).items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in packed(plain).items()}
        assert not is_same(backbone, plain)
        assert share_timesteps(backbone) is None
        mark_quantized(backbone, done.recipe)
        backbone.save_pretrained(tmp_path / "saved")
        loaded = type(backbone).from_pretrained(tmp_path / "saved")
        assert is_same(loaded, backbone)


class TestBias:
    """Bias correction."""

    def means(self, case, backbone, name, held_out=False):
        """Means by output channel of what a quantized layer lacks, on its own inputs."""
        inputs = []
        handle = backbone.get_submodule(name).register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        kwargs = samples(case, held_out)
        with torch.no_grad():
            backbone(**kwargs)
            handle.remove()
            exact = case[0].get_submodule(name)(inputs[0])
            lacking = exact - backbone.get_submodule(name)(inputs[0])
        return lacking.flatten(0, -2).mean(0), exact.flatten(0, -2).std(0)

    def test_nothing_is_left_of_the_mean(self, pixart, tmp_path):
        recipe = recipe_of(rounding="nearest", activations="fp6", learning=FAST | {"unit": "layer"})
        plain, _ = calibrated(pixart, recipe, tmp_path / "plain")
        corrected, done = calibrated(pixart, recipe.with_settings(transforms=["bias"]), tmp_path / "corrected")
        improved = 0
        for name, layer in quantized_layers(corrected).items():
            if layer.parts(layer.transforms[0])["table"].any():
                improved += 1
                mean, size = self.means(pixart, corrected, name)
                assert (mean.abs() <= 2e-5 * size.clamp(min=1)).all()
                assert not (self.means(pixart, plain, name)[0].abs() <= 2e-5 * size.clamp(min=1)).all()
        assert improved > len(done.layers) / 2
        for block in done.blocks:
            assert all(task["error"] <= task["nearest_error"] for task in block["tasks"])

    def test_it_is_dropped_where_held_out_data_gets_worse(self, pixart, tmp_path, monkeypatch):
        """With means of the wrong sign every correction hurts."""
        right = bias.correct
        monkeypatch.setattr(
            bias, "correct", lambda storage, residuals: {"table": -10 * right(storage, residuals)["table"] - 0.5}
        )
        recipe = recipe_of(rounding="nearest", activations="fp6", learning=FAST, transforms=["bias"])
        backbone, done = calibrated(pixart, recipe, tmp_path)
        kept = [layer.parts(layer.transforms[0])["table"].any() for layer in quantized_layers(backbone).values()]
        assert sum(kept) < len(kept) / 4
        assert all(block["tasks"][0]["error"] <= block["tasks"][0]["nearest_error"] for block in done.blocks)


def test_lqer_lowers_the_held_out_error(pixart, tmp_path):
    recipe = recipe_of(rounding="nearest", learning=FAST, transforms=[{"method": "lowrank", "rank": 8, "of": "error"}])
    backbone, done = calibrated(pixart, recipe, tmp_path / "lqer")
    plain, _ = calibrated(pixart, recipe.with_settings(transforms=[]), tmp_path / "plain")
    assert error_of(pixart, backbone) < 0.7 * error_of(pixart, plain)
    assert all(block["tasks"][0]["error"] < block["tasks"][0]["nearest_error"] for block in done.blocks)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.calib.runs import calibrated, captured, recipe_of
from tests.calib.layers.test_transforms import ALL, FAST
from dmquant.calib.blocks import decide
corrected = []
def correct(*args, correct=decide.correct):
    corrected.append(correct(*args))
    if len(corrected) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return corrected[-1]
decide.correct = correct
recipe = recipe_of(transforms=ALL, activations="fp6", learning=FAST)
calibrated(captured("pixart-sigma", Path(sys.argv[1]), blocks=2), recipe, Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_before_a_block_is_written_and_run_again_it_gives_the_same_parts(pixart, tmp_path):
    recipe = recipe_of(transforms=ALL, activations="fp6", learning=FAST)
    whole, _ = calibrated(pixart, recipe, tmp_path / "whole")
    assert Forked(["-c", SCRIPT, tmp_path / "data", tmp_path / "codes"]).wait(300) == -signal.SIGKILL
    told = []
    case = (pixart[0], pixart[1], CalibrationStore.open(tmp_path / "data"))
    resumed, _ = calibrated(case, recipe, tmp_path / "codes", say=told.append)
    assert ["already there" in line for line in told] == [True, False]
    assert is_same(resumed, whole)
