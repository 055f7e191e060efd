"""Formats and static scales of inputs are those of the inputs that the finished model has, folded or not."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from dmquant.calib.layers import ranges
from dmquant.calib.layers.activation_formats import choose_activation_formats
from dmquant.convert import plan
from dmquant.transforms.pair import pairs
from tests.calib.layers.test_ranges import Backbone, Store, static
from tests.calib.runs import calibrated, captured, quantized_layers, recipe_of, stopped_and_resumed

EQUALIZE = {"method": "equalize", "choose": True}
UNEVEN = torch.linspace(-5, 5, 32).exp2()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Channels of unlike size between the two layers of each pair."""
    backbone, blocks, store = captured("pixart-sigma", tmp_path_factory.mktemp("data"))
    for pair in pairs(backbone):
        pair.scale_(UNEVEN)
    return backbone, blocks, store


def recipe(**settings):
    learning = {"batch_size": 4}
    return recipe_of(
        weights="int8", granularity="channel", rounding="nearest", transforms=[EQUALIZE], learning=learning, **settings
    )


def factors_in(folder):
    """What was folded, by the name of the first layer that reads."""
    tensors = {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
    return {key.split(".equalize")[0]: value for key, value in tensors.items() if key.endswith("_folded")}


def used(case, backbone):
    """By layer, how much of the range of its static scales the inputs of the finished model fill."""
    shares, layers = {}, quantized_layers(backbone)

    def see(name):
        def hook(layer, args):
            largest = args[0].abs().flatten(0, -2).amax(0)
            fitted = layer.activations.fmt.max * layer.input_scale.view(torch.float32).amax(0)
            share = (largest / fitted).amax() if len(fitted) > 1 else largest.amax() / fitted[0]
            shares[name] = max(share.item(), shares.get(name, 0.0))

        return hook

    handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    learning = [index for index, sample in enumerate(case[2].samples) if not sample.held_out]
    with torch.no_grad():
        backbone(**case[2].batch(learning)[1])
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_static_scales_fit_the_inputs_after_folding(uneven, tmp_path, granularity):
    settings = {"activations": "int8", "activation_scale": "static:1", "activation_granularity": granularity}
    backbone, done = calibrated(uneven, recipe(**settings), tmp_path / "codes")
    factors = factors_in(tmp_path / "codes" / "blocks")
    assert any((factor != 1).any() for factor in factors.values())
    shares = used(uneven, backbone)
    assert shares.keys() == {layer.plan.name for layer in done.layers}
    assert all(0.2 < share < 10 for share in shares.values()), shares
    resumed, _ = stopped_and_resumed(uneven, recipe(**settings), tmp_path / "stopped")
    scales = {name: layer.input_scale for name, layer in quantized_layers(backbone).items()}
    assert all(torch.equal(layer.input_scale, scales[name]) for name, layer in quantized_layers(resumed).items())


def test_formats_are_chosen_for_the_inputs_after_folding(uneven, tmp_path):
    """As on a model in which the same pairs were even from the start."""
    settings = {"activations": "fp6", "activation_candidates": ["fp6_e2m3", "fp6_e4m1"]}
    _, done = calibrated(uneven, recipe(**settings), tmp_path / "codes")
    folded = copy.deepcopy(uneven[0])
    names = {layer: name for name, layer in folded.named_modules()}
    plans = {step.name: step for step in plan(folded, recipe(**settings))}
    before = choose_activation_formats(folded, plans, uneven[2], 4)
    for pair in pairs(folded):
        pair.scale_(factors_in(tmp_path / "codes" / "blocks")[names[pair.seconds[0]]])
    expected = choose_activation_formats(folded, plans, uneven[2], 4)
    assert expected != before
    assert {layer.plan.name: layer.plan.activations.fmt for layer in done.layers} == expected


def test_static_scales_are_on_the_device_of_their_layer(monkeypatch):
    """Observed on the CPU, where the histograms are counted; "meta" stands for a GPU."""
    seen, store = Backbone(), Store([0, 1])

    def run(backbone, watchers, store, batch_size, timesteps, progress):
        timesteps(torch.tensor([950.0, 950.0]))
        watchers["linear"](None, (torch.randn(2, 9, 8),))

    monkeypatch.setattr(ranges, "run_watched", run)
    found = ranges.observe_ranges(seen.to("meta"), {"linear": static(2)}, store, 2)["linear"]
    assert found.device.type == "meta"
    assert found.shape == (2, 1)
