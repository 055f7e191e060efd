"""Folded smoothing: the same function without a factor to store or to multiply by."""

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.calib.layers.fitting import output_error, with_outputs
from dmquant.calib.layers.folding import folds_of, shared_factor, without
from dmquant.calib.layers.statistics import InputObserver
from dmquant.convert import footprint, plan
from dmquant.layers import QuantLinear
from dmquant.qtensor import WeightSpec, quantize
from dmquant.recipe import Recipe
from dmquant.transforms import chains, create
from tests.calib.runs import (
    calibrated,
    captured,
    has_same_state,
    is_same,
    quantized_layers,
    recipe_of,
    saved_and_loaded,
    stopped_and_resumed,
)

AFFINE = ["attn1.to_q", "attn2.to_q", "ff.net.0.proj"]  # first readers of norms
LINEAR = ["attn1.to_out.0", "attn2.to_out.0", "ff.net.2"]
BLOCK = "down_blocks.0.attentions.0"
INSIDE = f"{BLOCK}.transformer_blocks.0"
FAST = {"iterations": 2, "batch_size": 4, "checks": 1}


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    backbone, blocks, store = captured("sd15", tmp_path_factory.mktemp("data"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms with channels of unlike size, and an offset
        for name, parameter in backbone.named_parameters():
            if ".norm" in name and INSIDE in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).exp())
    return backbone, blocks, store


def smoothing(fold=True, **options):
    return {"method": "smooth", "fold": fold, **options}


def unet_recipe(transforms, blocks=(BLOCK,), rounding="nearest", learning=FAST, **settings):
    kept = [{"match": "*", "keep": True}, {"match": [f"{name}.*" for name in blocks], "keep": False}]
    return recipe_of(keep=False, transforms=transforms, rounding=rounding, learning=learning, rules=kept, **settings)


def transformer_block(dtype=torch.float32):
    """A UNet's, with every parameter random."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24, norm_type="layer_norm").eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return block.to(dtype).requires_grad_(False)


def called(block, rows=2):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(rows, 10, 32, generator=generator), torch.randn(rows, 5, 24, generator=generator)
    dtype = block.norm1.weight.dtype
    return block(x.to(dtype), encoder_hidden_states=text.to(dtype))


def plans_of(module, **settings):
    settings = {"name": "x", "transforms": [smoothing()], "granularity": "group:16"} | settings
    return {step.name: step for step in plan(module, Recipe.model_validate(settings))}


def factor_of(channels, powers_of_two=False):
    generator = torch.Generator().manual_seed(channels)
    exponents = 3 * torch.randn(channels, generator=generator)
    return (exponents.round() if powers_of_two else exponents).exp2()


def test_the_float_block_computes_the_same_and_its_readers_need_no_smoothing():
    block = transformer_block()
    plans, before, expected = plans_of(block), copy.deepcopy(block), called(block)
    folds = folds_of(block, "", plans, "smooth")
    assert [fold.readers[0] for fold in folds] == [*AFFINE, *LINEAR]
    assert folds[0].readers == ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    for fold in folds:
        fold.pair.scale_(factor_of(fold.pair.channels))
    assert not torch.allclose(block.norm1.weight, before.norm1.weight)
    assert (called(block) - expected).norm() <= 1e-6 * expected.norm()
    folded = {name for fold in folds for name in fold.readers}
    assert not any(without(plans[name], "smooth").transforms for name in folded)
    assert {"attn2.to_k", "attn2.to_v"} == plans.keys() - folded  # read the text, which comes from outside


def test_in_16_bits_not_a_bit_of_the_output_changes():
    block = transformer_block(torch.bfloat16)
    plans, expected = plans_of(block), called(block)
    for fold in folds_of(block, "", plans, "smooth"):
        assert fold.pair.needs_powers_of_two
        fold.pair.scale_(factor_of(fold.pair.channels, powers_of_two=True))
    assert torch.equal(called(block), expected)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"transforms": [smoothing(fold=False)]}, []),
        ({"rules": [{"match": "attn1.to_k", "transforms": []}]}, [*AFFINE[1:], *LINEAR]),
        ({"rules": [{"match": "attn1.to_k", "keep": True}]}, [*AFFINE[1:], *LINEAR]),
        ({"rules": [{"match": "attn1.to_k", "transforms": [smoothing(alpha=[0.5])]}]}, [*AFFINE[1:], *LINEAR]),
        ({"granularity": "tensor"}, AFFINE),
        ({"rules": [{"match": "ff.net.0.proj", "granularity": "tensor"}]}, [*AFFINE, *LINEAR[:2]]),
        ({"rules": [{"match": "*.to_v", "keep": True}]}, [*AFFINE[1:], *LINEAR]),
    ],
)
def test_only_where_every_reader_would_and_the_layer_before_can(settings, left):
    block = transformer_block()
    assert [fold.readers[0] for fold in folds_of(block, "", plans_of(block, **settings), "smooth")] == left


def observed(block, plans, names):
    """Quantized layers to be, and what they were given in a call."""
    inputs, observers = {}, {}
    for name in names:
        layer, step = block.get_submodule(name), plans[name]
        inputs[name] = QuantLinear.like(layer, step.weights, step.activations, "meta", step.transforms)
        observers[name] = InputObserver(inputs[name], 1)
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda layer, args, one=one: one.add(args[0]))
        for name, one in observers.items()
    ]
    called(block)
    for handle in handles:
        handle.remove()
    return inputs, {name: observer.statistics() for name, observer in observers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_of_one_norm_share_the_factor_of_least_summed_relative_error(dtype):
    block = transformer_block(dtype)
    block.norm1.weight[[3, 20]] *= 30
    block.attn1.to_v.weight.mul_(50)  # its error is the largest by far, but not relative to its output
    transforms = [smoothing(alpha=[0.3, 0.5, 0.7]), {"method": "rotate", "size": 8}]
    plans = plans_of(block, transforms=transforms, activations="int8", activation_granularity="tensor", weights="int8")
    (fold, *_) = folds_of(block, "", plans, "smooth")
    inputs, statistics = observed(block, plans, fold.readers)
    found = shared_factor(fold, plans, inputs, statistics)

    weights = {name: block.get_submodule(name).weight.float() for name in fold.readers}
    largest = torch.cat(list(weights.values())).abs().amax(0)
    x = statistics["attn1.to_q"].absmax[0]
    candidates, errors = [torch.ones(32)], []
    for alpha in (0.3, 0.5, 0.7):
        candidates.append((largest ** (1 - alpha) / x**alpha).bfloat16().float())
    if dtype == torch.bfloat16:
        candidates = [factor.log2().round().exp2() for factor in candidates]
    for factor in candidates:
        total = 0.0
        for name, weight in weights.items():
            layer, step = block.get_submodule(name), plans[name]
            rotate = step.transforms[1]
            parts, rotated = next(chains((rotate,), weight / factor, statistics[name]))
            inputs[name].transforms = step.transforms
            inputs[name].load_parts({"smooth": {"factor": factor.bfloat16().view(1, -1)}, **parts})
            sample = with_outputs(layer, statistics[name].sample)
            total += output_error(layer, step, inputs[name], rotated, sample)
        errors.append(total)
    assert errors.index(min(errors)) > 0
    assert torch.equal(found, candidates[errors.index(min(errors))])
    assert found[[3, 20]].max() < found[torch.arange(32) % 17 != 3].median()


def test_without_samples_nothing_is_smoothed():
    block = transformer_block()
    plans = plans_of(block)
    (fold, *_) = folds_of(block, "", plans, "smooth")
    nothing = dict.fromkeys(fold.readers)
    assert torch.equal(shared_factor(fold, plans, nothing, nothing), torch.ones(32))


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_folded_layer_gives_what_it_gave_with_the_factor_before_it(activations):
    """The same codes, because the weight is divided by the same factor."""
    torch.manual_seed(0)
    norm, layer, x = nn.LayerNorm(32), nn.Linear(32, 24), torch.randn(4, 10, 32)
    factor = factor_of(32).bfloat16().float()
    spec = WeightSpec.parse("fp4", "group:16")
    of_input = None if activations == "none" else ActivationSpec.parse(activations)
    transforms = create([("smooth", {})], layer, None)
    explicit, folded = (QuantLinear.like(layer, spec, of_input, "meta", which) for which in (transforms, ()))
    explicit.load_parts({"smooth": {"factor": factor.bfloat16().view(1, -1)}})
    explicit.load_quantized(
        quantize(transforms[0].to_quantize(layer.weight.detach(), explicit.parts(transforms[0])), spec), layer.bias
    )
    scaled, divided = copy.deepcopy(norm), copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight.mul_(factor)
        scaled.bias.mul_(factor)
        divided.weight.div_(factor)
    folded.load_quantized(quantize(divided.weight.detach(), spec), layer.bias)
    assert torch.equal(folded.qweight, explicit.qweight)
    with torch.no_grad():
        one, other = folded(scaled(x)), explicit(norm(x))
    close = (one - other).abs() <= 1e-5 * other.abs().max()
    assert close.all() if of_input is None else close.float().mean() > 0.97  # an input may round to the other side


def test_calibrated_models_hold_the_changed_norms_and_no_factors(unet, tmp_path):
    recipe = unet_recipe([smoothing(), {"method": "rotate", "size": 8}], activations="int8")
    backbone, done = calibrated(unet, recipe, tmp_path / "folded")
    explicit, _ = calibrated(
        unet,
        unet_recipe([smoothing(False), {"method": "rotate", "size": 8}], activations="int8"),
        tmp_path / "explicit",
    )
    names = {name: [one.name for one in layer.transforms] for name, layer in quantized_layers(backbone).items()}
    with_factor = {f"{BLOCK}.proj_in", f"{BLOCK}.proj_out", f"{INSIDE}.attn2.to_k", f"{INSIDE}.attn2.to_v"}
    assert {name for name, left in names.items() if left == ["smooth", "rotate"]} == with_factor
    assert {name for name, left in names.items() if left == ["rotate"]} == names.keys() - with_factor
    changed = {
        name
        for name, parameter in backbone.named_parameters()
        if "norm" in name and not torch.equal(parameter, unet[0].get_parameter(name))
    }
    assert changed == {f"{INSIDE}.norm{number}.{leaf}" for number in (1, 2, 3) for leaf in ("weight", "bias")}
    assert footprint(backbone).quantized_bytes < footprint(explicit).quantized_bytes

    loaded = saved_and_loaded("sd15", backbone, done.recipe, tmp_path / "saved")
    assert is_same(loaded, backbone)
    args, kwargs = unet[2].batch([0, 1])
    with torch.no_grad():
        assert torch.equal(loaded(*args, **kwargs)[0], backbone(*args, **kwargs)[0])
    assert Recipe.model_validate(done.recipe.to_dict()) == done.recipe
    exact, errors = unet[0], []
    with torch.no_grad():
        expected = exact(*args, **kwargs)[0]
        errors = [(one(*args, **kwargs)[0] - expected).square().mean().item() for one in (backbone, explicit)]
    assert errors[0] < 1.5 * errors[1]


def test_without_rounding_the_whole_backbone_computes_the_same(unet, tmp_path):
    """With a float32 scale for each weight alone."""
    recipe = unet_recipe([smoothing(alpha=[0.5])], weights="int8", granularity="group:1", store="fp32")
    backbone, done = calibrated(unet, recipe, tmp_path)
    assert all(task["error"] < 1e-10 for block in done.blocks for task in block["tasks"])
    args, kwargs = unet[2].batch([0, 1])
    with torch.no_grad():
        output, expected = backbone(*args, **kwargs)[0], unet[0](*args, **kwargs)[0]
    assert (output - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("rounding", "unit"), [("nearest", "block"), ("adaround", "block"), ("adaround", "layer"), ("nearest", "window")]
)
def test_interrupted_and_run_again_it_gives_the_same_model(unet, tmp_path, rounding, unit):
    transforms = [smoothing(alpha=[0.5], ranges=2), "outliers"]
    blocks = (f"{INSIDE}.attn1", f"{INSIDE}.ff", "up_blocks.1.attentions.0.transformer_blocks.0.ff")
    recipe = unet_recipe(transforms, blocks, rounding, FAST | {"unit": unit}, activations="int8")
    whole, reports = calibrated(unet, recipe, tmp_path / "whole")
    resumed, again = stopped_and_resumed(unet, recipe, tmp_path / "stopped")
    assert has_same_state(resumed, whole)
    assert [layer.error for layer in again.layers] == [layer.error for layer in reports.layers]
    assert again.recipe == reports.recipe


def test_norms_without_weights_take_no_factor(tmp_path):
    """PixArt's: its attention alone is linear in what it gives on."""
    case = captured("pixart-sigma", tmp_path / "data", blocks=2)
    recipe = recipe_of(transforms=[smoothing(alpha=[0.5])], rounding="nearest", learning=FAST)
    others = [{"match": "*.to_out.0", "transforms": []}]
    without = [
        recipe_of(transforms=[smoothing(fold, alpha=[0.5])], rounding="nearest", learning=FAST, rules=others)
        for fold in (True, False)
    ]
    backbone, done = calibrated(case, recipe, tmp_path / "folded")
    folded = {name for name, layer in quantized_layers(backbone).items() if not layer.transforms}
    assert folded == {name for name in quantized_layers(backbone) if name.endswith(".to_out.0")}
    one, other = (calibrated(case, recipe, tmp_path / str(number)) for number, recipe in enumerate(without))
    assert is_same(one[0], other[0])
    assert one[1].recipe == without[0]
    assert done.recipe != recipe
