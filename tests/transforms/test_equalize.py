"""Equalization changes the weights of real backbones and not what they compute."""

import copy

import pytest
import torch
from torch import nn

from dmquant.convert import plan, quantize_
from dmquant.diffusers.families import families
from dmquant.qtensor import quantize_tensor
from dmquant.recipe import Recipe
from dmquant.transforms import fold_first_
from dmquant.transforms.equalize import equalizing
from dmquant.transforms.pair import Pair, pairs
from tests.tiny import TINY

EQUALIZE = Recipe(name="x", transforms=["equalize"])


def backbone_of(model):
    """A tiny backbone with no weight zero, and the arguments of a call of it by its own pipeline."""
    tiny = TINY[model]
    family, pipeline = families()[tiny.family], tiny.build()
    backbone, calls = getattr(pipeline, family.component), []
    handle = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    size = {"height": tiny.size, "width": tiny.size}
    call = size | {"num_inference_steps": 1, "output_type": "latent"} | dict(tiny.call)
    family.prompted(pipeline)(prompt=list(tiny.prompts[:1]), **call)
    handle.remove()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # ranges that differ from channel to channel, biases and norms included
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone, calls[0]


def output(backbone, call):
    args, kwargs = call
    with torch.no_grad():
        result = backbone(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else result.sample


def equalized(backbone, recipe=EQUALIZE):
    fold_first_(backbone, {step.name: step.transforms for step in plan(backbone, recipe)})


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("pixart-sigma", 6),  # two attentions in each of three blocks; no gated feed-forward
        ("sd15", 24),  # in each of four blocks two attentions, a gated feed-forward and three norms
        ("sdxl", 42),
        ("hunyuan-1.2", 12),  # two attentions and a gated feed-forward in each of four blocks
        ("sd3", 4),  # joint attention in three blocks, one of which has a second attention
        ("flux", 2),  # single blocks join attention and feed-forward before one output
        ("flux2", 2),
        ("chroma", 2),
        ("hunyuanimage", 3),  # the refiner of texts has an attention as well
        ("qwenimage", 3),
        ("cogview4", 3),
        ("auraflow", 4),
        ("sana", 4),
        ("dit", 2),
    ],
)
def test_the_backbone_computes_the_same(model, found):
    backbone, call = backbone_of(model)
    before, weights = output(backbone, call), copy.deepcopy(backbone.state_dict())
    equalized(backbone)
    assert len(list(pairs(backbone))) == found
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    after = output(backbone, call)
    assert (after - before).norm() <= 1e-6 * before.norm()


def equalize_(pair):
    pair.scale_(pair.allowed(equalizing(pair)))


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    first, second = nn.Linear(16, 12), nn.Linear(12, 8)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(-2, 2, 12).unsqueeze(1))
    return first.to(dtype), second.to(dtype)


def test_ranges_become_equal_and_again_changes_nothing():
    first, second = two_layers()
    pair = Pair((first,), (second,), 12)
    expected = first.weight.abs().amax(1) * second.weight.abs().amax(0)
    equalize_(pair)
    ranges = first.weight.abs().amax(1), second.weight.abs().amax(0)
    assert torch.allclose(*ranges, rtol=1e-5)
    assert torch.allclose(ranges[0] * ranges[1], expected, rtol=1e-5)
    weights = first.weight.clone(), second.weight.clone()
    equalize_(pair)
    assert torch.allclose(first.weight, weights[0], rtol=1e-6)
    assert torch.allclose(second.weight, weights[1], rtol=1e-6)


def test_in_16_bits_not_a_bit_of_the_output_changes():
    first, second = two_layers(torch.bfloat16)
    x = torch.randn(5, 16).bfloat16()
    before, weight = second(first(x)), first.weight.clone()
    equalize_(Pair((first,), (second,), 12))
    assert not torch.equal(first.weight, weight)
    assert torch.equal(second(first(x)), before)


def test_one_scale_for_all_of_a_weight_then_loses_less():
    """methods.md section 10: FP4 per tensor."""
    errors = []
    for equalize in (False, True):
        first, second = two_layers()
        second.weight.data /= torch.logspace(-2, 2, 12)
        first.bias.data.zero_()
        x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
        expected = second(first(x))
        if equalize:
            equalize_(Pair((first,), (second,), 12))
        for layer in (first, second):
            layer.weight.data = quantize_tensor(layer.weight, "fp4", "tensor").dequantize()
        errors.append((second(first(x)) - expected).square().mean().item())
    assert errors[1] <= 0.2 * errors[0]


def test_channels_without_range_are_left_alone():
    first, second = two_layers()
    first.weight.data[3], second.weight.data[:, 5] = 0, 0
    row, column = first.weight[5].clone(), second.weight[:, 3].clone()
    equalize_(Pair((first,), (second,), 12))
    assert torch.equal(first.weight[5], row)
    assert torch.equal(second.weight[:, 3], column)


def test_rules_say_which_layers_take_part():
    backbone, _ = backbone_of("sd15")
    before = copy.deepcopy(backbone.state_dict())
    only = Recipe(name="x", rules=[{"match": "*.attn1.to_out.0", "transforms": ["equalize"]}])
    equalized(backbone, only)
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith(("attn1.to_v.weight", "attn1.to_out.0.weight")) for name in changed)


def test_what_has_no_such_pair_is_quantized_as_ever():
    plain, prepared = (nn.Sequential(*two_layers()) for _ in range(2))
    quantize_(plain, EQUALIZE.with_settings(transforms=[]))
    quantize_(prepared, EQUALIZE)
    assert torch.equal(plain[0].dequantize(torch.float32), prepared[0].dequantize(torch.float32))
    assert not list(pairs(plain))
