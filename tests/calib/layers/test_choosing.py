"""Transforms that calibration gives to those layers alone whose output is nearer for them."""

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.calib.layers.fitting import choose, fit_transforms
from dmquant.calib.layers.folding import folds_of, shared_factor
from dmquant.calib.layers.statistics import InputObserver
from dmquant.convert import LayerPlan, quantize_
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.layers import QuantConv2d, QuantLinear, quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import InputStatistics, create
from tests.calib.layers.test_folding import observed, plans_of, transformer_block, unet_recipe
from tests.calib.runs import (
    calibrated,
    captured,
    has_same_state,
    quantized_layers,
    recipe_of,
    saved_and_loaded,
    stopped_and_resumed,
)

FAST = {"iterations": 2, "batch_size": 4, "checks": 1}
ROTATE = {"method": "rotate", "size": 8, "choose": True}
EQUALIZE = {"method": "equalize", "choose": True}
BLOCKS = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return captured("sd15", tmp_path_factory.mktemp("data"))


def outlier_case():
    """One input channel dwarfs the others, which share a scale with it."""
    torch.manual_seed(0)
    x = torch.randn(100, 64)
    x[:, 5] *= 50
    return nn.Linear(64, 32), x, WeightSpec.parse("int8", "channel", "mse"), ActivationSpec.parse("int8", "tensor")


def exact_case():
    """Every weight is a value of the format, until they are mixed."""
    torch.manual_seed(0)
    layer, values = nn.Linear(64, 32), get_format("fp4").values
    with torch.no_grad():
        layer.weight.copy_(values[torch.randint(len(values), (32, 64))])
        layer.weight[:, 0] = values.max()
    return layer, torch.randn(100, 64), WeightSpec.parse("fp4", "channel", "mse"), None


@pytest.mark.parametrize(("case", "rotated"), [(outlier_case, True), (exact_case, False)])
@pytest.mark.parametrize("choose", [True, False])
def test_a_layer_is_rotated_where_its_output_is_nearer_for_it(case, rotated, choose):
    layer, x, spec, of_input = case()
    transforms = create([("rotate", {"size": 8, "choose": choose}), ("bias", {})], layer, None)
    errors = []
    for left in (transforms, transforms[1:]):
        one = quantize_layer(layer, spec, of_input, transforms=left)
        errors.append((one(x) - layer(x)).square().mean().item())
    assert (errors[0] < 0.5 * errors[1]) == rotated
    assert (errors[1] < 0.5 * errors[0]) == (not rotated)

    quantized = QuantLinear.like(layer, spec, of_input, "meta", transforms)
    statistics = InputStatistics(x.abs().amax(0, keepdim=True), [x])
    weight = fit_transforms(layer, LayerPlan("layer", spec, of_input, transforms=transforms), quantized, statistics)
    assert quantized.transforms == (transforms if rotated or not choose else transforms[1:])
    assert torch.equal(weight, layer.weight) == (len(quantized.transforms) == 1)


@pytest.mark.parametrize(
    ("errors", "worth", "best"),
    [
        ([1.0, 0.95, 0.91], 0.9, 1.0),
        ([1.0, 0.95, 0.91], 1.0, 0.91),
        ([1.0, 0.89, 0.5, 0.7], 0.9, 0.5),
        ([0.0, 0.0], 1.0, 0.0),
    ],
)
def test_what_is_chosen_has_the_least_error_and_is_worth_it(errors, worth, best):
    assert choose(iter(errors), lambda error: error, worth) == best


def test_where_there_is_no_choice_nothing_is_computed():
    assert choose([3], lambda candidate: pytest.fail("asked for its error")) == 3


def test_without_samples_a_layer_keeps_what_the_recipe_gives_it():
    layer, *_ = exact_case()
    transforms = create([("rotate", {"choose": True})], layer, None)
    quantized = QuantLinear.like(layer, WeightSpec.parse("int4"), None, "meta", transforms)
    fit_transforms(layer, LayerPlan("layer", quantized.weight_spec, None, transforms=transforms), quantized, None)
    assert quantized.transforms == transforms


def test_samples_come_from_the_whole_schedule_and_all_over_an_image():
    layer, conv = nn.Linear(4, 3), nn.Conv2d(4, 3, 3)
    spec, calls = WeightSpec.parse("int4", "channel"), 100
    seen = []
    for kind, one in ((QuantLinear, layer), (QuantConv2d, conv)):
        observer = InputObserver(kind.like(one, spec, None, "meta", create([("smooth", {})], one, None)), calls)
        position = torch.arange(64.0)
        for call in range(calls):
            x = (call * 10_000 + 100 * position.view(-1, 1) + position).expand(4, 4, 64, 64)
            observer.add(x if kind is QuantConv2d else x.flatten(2).transpose(1, 2))
        seen.append([x[0].flatten() for x in observer.statistics().sample])
    for sample in seen:
        when = [int(x.min()) // 10_000 for x in sample]
        assert len(when) in range(16, 33)
        assert min(when) < 5
        assert max(when) > 94
    rows, columns = (seen[0][0] // 100).unique(), (seen[0][0] % 100).unique()
    assert min(rows.min(), columns.min()) < 8
    assert max(rows.max(), columns.max()) >= 56
    assert (seen[1][0] // 100).unique().tolist() == list(range(24, 40))
    assert (seen[1][0] % 100).unique().tolist() == list(range(24, 40))


def test_samples_are_of_both_branches_of_the_guidance(unet):
    """Layers that read the text get that of the prompt and that without one."""
    backbone, _, store = unet
    name = f"{BLOCKS[0]}.transformer_blocks.0.attn2.to_k"
    layer, indices = backbone.get_submodule(name), range(len(store.samples))
    plan = plans_of(backbone, transforms=[ROTATE])[name]
    observer = InputObserver(QuantLinear.like(layer, plan.weights, None, "meta", plan.transforms), 1)
    handle = layer.register_forward_pre_hook(lambda layer, args: observer.add(args[0]))
    args, kwargs = store.batch(indices)
    with torch.no_grad():
        backbone(*args, **kwargs)
    handle.remove()
    [rows] = observer.statistics().sample
    text = kwargs["encoder_hidden_states"]
    assert torch.equal(rows, text[:2])
    assert torch.equal(text[0], text[2])
    assert not torch.equal(text[0], text[1])


def unlike_columns(block):
    """Columns of unlike size, in rows that have one scale, for channels of like size."""
    block.norm3.weight.fill_(1.0)
    block.ff.net[0].proj.weight.mul_(torch.linspace(-4, 4, 32).exp2())


def exact_weights(block):
    """Every weight is a value of the format, until the columns are scaled."""
    weight = block.ff.net[0].proj.weight
    weight.copy_(torch.randint(-7, 8, weight.shape)).narrow(1, 0, 1).fill_(7)


@pytest.mark.parametrize(("change", "even"), [(unlike_columns, True), (exact_weights, False)])
def test_a_pair_is_evened_out_where_its_reader_is_nearer_for_it(change, even):
    block = transformer_block()
    with torch.no_grad():
        change(block)
    plans = plans_of(block, transforms=[EQUALIZE], weights="int4", granularity="channel", activations="none")
    [fold] = [one for one in folds_of(block, "", plans, "equalize") if one.readers == ("ff.net.0.proj",)]
    inputs, statistics = observed(block, plans, fold.readers)
    found = shared_factor(fold, plans, inputs, statistics)
    largest = block.ff.net[0].proj.weight.abs().amax(0)
    evened = (block.norm3.weight.abs() / largest).sqrt()
    assert torch.allclose(found, 1 / evened if even else torch.ones(32), rtol=1e-5)


@pytest.mark.parametrize("unit", ["block", "layer", "window"])
def test_what_was_chosen_is_saved_and_read_back(unet, tmp_path, unit):
    recipe = unet_recipe([EQUALIZE, ROTATE, "outliers"], BLOCKS, learning=FAST | {"unit": unit}, activations="int8")
    whole, done = calibrated(unet, recipe, tmp_path / "whole")
    left = {name: [one.name for one in layer.transforms] for name, layer in quantized_layers(whole).items()}
    assert sum("rotate" in names for names in left.values()) in range(1, len(left))
    assert all("outliers" in names for names in left.values())
    assert done.recipe != recipe
    loaded = saved_and_loaded("sd15", whole, done.recipe, tmp_path / "saved")
    args, kwargs = unet[2].batch([0, 1])
    with torch.no_grad():
        assert torch.equal(loaded(*args, **kwargs)[0], whole(*args, **kwargs)[0])

    resumed, again = stopped_and_resumed(unet, recipe, tmp_path / "stopped")
    assert has_same_state(resumed, whole)
    assert again.recipe == done.recipe


def test_two_methods_fold_one_after_another_into_the_same_layers(unet, tmp_path):
    """With a float32 scale for each weight alone, nothing is lost but in folding."""
    transforms = [EQUALIZE, {"method": "smooth", "alpha": [0.5]}]
    recipe = unet_recipe(transforms, BLOCKS[:1], weights="int8", granularity="group:1", store="fp32")
    backbone, done = calibrated(unet, recipe, tmp_path)
    assert all(task["error"] < 1e-10 for block in done.blocks for task in block["tasks"])
    readers = [layer for name, layer in quantized_layers(backbone).items() if name.endswith(("attn1.to_q", "net.2"))]
    assert len(readers) == 2
    assert not any(layer.transforms for layer in readers)


@pytest.mark.parametrize("transform", [ROTATE, EQUALIZE])
def test_a_choice_takes_data(unet, transform):
    recipe = recipe_of(transforms=[transform], rounding="nearest", scale="mse")
    assert recipe.calibrated
    with pytest.raises(UsageError, match="needs calibration data"):
        quantize_(unet[0], recipe)
    assert not Recipe.model_validate({"name": "x", "transforms": [transform["method"]]}).calibrated
