"""`dequantize()` of a quantized model: float layers of the weights as quantized, which are saved as full precision."""

import copy
import json

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.convert import quantize_
from dmquant.diffusers.dequantize import dequantize_
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.errors import UserError
from dmquant.layers import QuantConv2d, QuantLinear, quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from tests.tiny import TINY

TRANSFORMS = [
    {"method": "rotate"},
    {"method": "lowrank", "rank": 4, "iterations": 0},
    {"method": "outliers", "share": 0.01},
]


def build(kind="sd15"):
    pipeline = TINY[kind].build()
    return getattr(pipeline, "unet", None) or pipeline.transformer


@torch.no_grad()
def output(unet):
    generator, config = torch.Generator().manual_seed(0), unet.config
    noise = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    text = torch.randn(2, 3, config.cross_attention_dim, generator=generator)
    return unet(noise.to(unet.dtype), 500, text.to(unet.dtype)).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transforms", [[], TRANSFORMS], ids=["plain", "transforms"])
def test_a_model_whose_inputs_are_not_quantized_computes_the_same(dtype, transforms, tmp_path):
    model = build().to(dtype)
    names, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    quantize_(model, Recipe.load("rtn", "fp4", "none").with_settings(transforms=transforms))
    expected, written = output(model), json.loads(model.to_json_string())
    assert model.dequantize() is model
    assert {type(part) for part in model.modules()}.isdisjoint({QuantLinear, QuantConv2d})
    assert [type(part) for part in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert {one.dtype for one in model.parameters()} == {dtype}
    close = 1e-5 if dtype == torch.float32 else 0.05
    assert (output(model) - expected).norm() < close * expected.norm()
    config = json.loads(model.to_json_string())
    assert config == {name: value for name, value in written.items() if name != "quantization_config"}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in model.state_dict().items())


def test_a_loaded_model_is_dequantized_too(tmp_path):
    model = build()
    quantize_(model, "w4a16")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.allclose(output(loaded.dequantize()), output(model), atol=1e-4)
    assert "quantization_config" not in loaded.config
    loaded.to(torch.float16).to(torch.float32)


def test_a_dequantized_model_is_an_ordinary_one():
    recipe = Recipe.load("rtn64")  # whose scales are found again: they depend on their own group alone
    model = build()
    plain = copy.deepcopy(model)
    quantize_(model, recipe)
    model.dequantize()
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert vars(one).keys() - {"quantization_method", "hf_quantizer", "is_quantized"} == vars(other).keys()
    with pytest.raises(ValueError, match="You need to first quantize your model"):
        model.dequantize()
    assert model.num_parameters() == plain.num_parameters()
    with torch.no_grad():
        model.fuse_qkv_projections()
    first = [report.error for report in quantize_(plain, recipe)]
    again = build()
    quantize_(again, recipe)
    again.dequantize()
    assert all(error < 1e-9 for error in (report.error for report in quantize_(again, recipe)))
    assert min(first) > 1e-4


def test_what_two_recipes_quantized_is_savable_once_it_is_dequantized(tmp_path):
    model = build()
    quantize_(model, Recipe(name="middle", keep="none", rules=[{"match": "[!m]*", "keep": True}]))
    quantize_(model, "w8a8")
    with pytest.raises(UserError, match="quantized in place"):
        model.save_pretrained(tmp_path)
    model.dequantize()
    model.save_pretrained(tmp_path)
    type(model).from_pretrained(tmp_path)


def test_hooks_adapters_and_other_places_of_a_layer_stay():
    peft = pytest.importorskip("peft")
    model, calls = build(), []
    quantize_(model, Recipe.load("rtn", "fp8", "none"))
    query = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    query.register_forward_hook(lambda *_: calls.append(1))
    query.note = "mine"
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    expected = output(model)
    calls.clear()
    model.dequantize()
    assert torch.allclose(output(model), expected, atol=1e-4)
    assert calls
    assert type(query) is nn.Linear
    assert query.note == "mine"


def test_timesteps_are_told_no_more():
    model, spec = build("pixart-sigma"), ActivationSpec.parse("fp6", "tensor", scale="static:2")
    recipe = Recipe.load("w4a6").with_settings(
        keep="none",
        rules=[{"match": "[!t]*", "keep": True}],
        activation_scale="static:2",
        activation_granularity="tensor",
    )
    name = "transformer_blocks.0.attn1.to_q"
    layer = quantize_layer(model.get_submodule(name), WeightSpec.parse("fp4"), spec, input_scale=torch.ones(2, 1))
    model.set_submodule(name, layer)
    mark_quantized(model, recipe)
    assert model._forward_pre_hooks
    model.dequantize()
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_an_offloaded_model_is_refused_and_left_as_it_is():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(quantize_layer(nn.Linear(32, 32), WeightSpec.parse("fp4"), None))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"^some layers are offloaded or cast by hooks: call dequantize\(\) before"):
        dequantize_(model)
    assert model(torch.randn(2, 32)).isfinite().all()
