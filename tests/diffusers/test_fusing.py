"""Adapters fused into quantized layers: what is added, what it costs, and that it can be undone."""

import copy
import logging

import pytest
import torch
from torch import nn

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.convert import quantize_
from dmquant.errors import UsageError, UserError
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import create
from tests.diffusers.test_adapters import JOINT, KINDS, SINGLE, Layers, lora, output
from tests.tiny import TINY

peft = pytest.importorskip("peft")
FP8 = Recipe.load("rtn", "fp8", "none")


@pytest.fixture(scope="module")
def tiny_flux():
    pipe = TINY["flux"].build()
    quantize_(pipe.transformer, FP8)
    return pipe


@pytest.fixture
def flux(tiny_flux):
    """A quantized Flux with two LoRAs on it."""
    pipe = copy.deepcopy(tiny_flux)
    pipe.load_lora_weights(lora(pipe.transformer, (*JOINT, *SINGLE)), adapter_name="one")
    pipe.load_lora_weights(lora(pipe.transformer, JOINT[:2], seed=2), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    return pipe


def codes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}


def test_a_pipeline_fuses_two_loras_saves_them_and_puts_its_codes_back(flux, tmp_path, caplog):
    model = flux.transformer
    unfused, before = output(model), codes(model)
    with caplog.at_level(logging.INFO, "dmquant"):
        flux.fuse_lora(lora_scale=0.5, requantize=True)
    assert f"fused into {len({*JOINT, *SINGLE})} layers" in caplog.text
    assert flux.num_fused_loras == 2
    fused, after = output(model), codes(model)
    assert not torch.allclose(fused, unfused, atol=1e-3)  # at half of their scale
    flux.unfuse_lora()
    restored = codes(model)
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert flux.num_fused_loras == 0
    flux.fuse_lora(requantize=True)
    again = output(model)
    flux.unload_lora_weights()
    assert torch.equal(output(model), again)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), again)


def test_fused_layers_are_the_nearest_codes_of_the_sum(flux):
    model, layers = flux.transformer, {*JOINT, *SINGLE}
    wrapped = {name: model.get_submodule(name) for name in layers}
    wanted = {}
    for name, layer in wrapped.items():
        wanted[name] = layer.base_layer.float_weight()
        for adapter in layer.lora_A:
            wanted[name] = wanted[name] + layer.get_delta_weight(adapter)
    with dmquant.requantizing(model) as rows:
        model.fuse_lora()
    assert {row.layer for row in rows} == layers
    for row in rows:
        base = wrapped[row.layer].base_layer
        plain = nn.Linear(base.in_features, base.out_features)
        expected = quantize_layer(plain, base.weight_spec, None, wanted[row.layer])
        assert torch.allclose(base.float_weight(), expected.float_weight(), atol=1e-6)
        assert 0 < row.of_weight < 0.05 * (1 + row.of_weight / row.of_change)  # three bits of mantissa
    with pytest.raises(UserError, match=r"^fusing into quantized layers .*fuse_lora\(requantize=True\)"):
        flux.fuse_lora()


def test_fusing_is_refused_before_it_changes_anything(flux):
    before = codes(flux.transformer)
    for refused in (flux, flux.transformer):
        with pytest.raises(UserError, match=r"^fusing into quantized layers .*fuse_lora\(requantize=True\)"):
            refused.fuse_lora()
    after = codes(flux.transformer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    flux.unload_lora_weights()
    for without in (flux, flux.transformer):
        with pytest.raises(UsageError, match=r"^no quantized layer has an adapter"):
            without.fuse_lora(requantize=True)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_other_adapters_are_fused_by_what_peft_merges(kind):
    torch.manual_seed(2)
    base, x = Layers(), (torch.randn(3, 32), torch.randn(1, 8, 5, 5))
    plain = base(*x)
    adapted = peft.get_peft_model(base, KINDS[kind]())
    unfused = adapted(*x)
    with dmquant.requantizing(adapted) as rows:
        adapted.merge_adapter()
    for before, fused, unfused_one in zip(plain, adapted(*x), unfused, strict=True):
        assert (fused - unfused_one).norm() < 0.06 * unfused_one.norm()  # FP8 has three bits of mantissa
        assert kind == "VeRA" or not torch.allclose(fused, before, atol=1e-3)
    assert all(row.of_weight < 0.1 for row in rows)
    adapted.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(adapted(*x), unfused, strict=True))
    with dmquant.requantizing(adapted):
        merged = adapted.merge_and_unload()
    assert type(merged.to_q) is type(base.to_q)


@pytest.mark.parametrize("transforms", [["lowrank:4"], ["smooth"], ["rotate"], ["outliers"]], ids=str)
def test_transforms_stay_as_they_are(transforms):
    torch.manual_seed(3)
    plain = nn.Linear(64, 48)
    settings = [(name.partition(":")[0], {"rank": 4} if ":" in name else {}) for name in transforms]
    layer = quantize_layer(plain, WeightSpec.parse("fp4", "group:16"), None, transforms=create(settings, plain, None))
    model = peft.get_peft_model(nn.ModuleDict({"to_q": layer}), peft.LoraConfig(r=2, target_modules=["to_q"]))
    wrapped = model.base_model.model["to_q"]
    nn.init.normal_(wrapped.lora_B["default"].weight, std=0.1)
    wanted = layer.float_weight() + wrapped.get_delta_weight("default")
    parts = {name: getattr(layer, name).clone() for name in layer.part_names}
    with dmquant.requantizing(model) as [*rows]:
        assert rows == []
        model.merge_adapter()
    assert all(torch.equal(getattr(layer, name), part) for name, part in parts.items())
    assert (layer.float_weight() - wanted).norm() < 0.15 * wanted.norm()  # FP4 with a scale for 16
