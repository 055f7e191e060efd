"""What `quantize_` made in place is saved as what it is, or not at all."""

import json
import pickle

import pytest
import torch
from torch import nn

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.convert import quantize_
from dmquant.errors import UserError
from dmquant.recipe import Recipe, Rule
from tests.tiny import TINY, tiny_sd
from tests.tiny.parts import vae

from diffusers import CogVideoXTransformer3DModel  # isort: skip


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["sd15", "pixart-sigma", "dit"])
def test_a_backbone_reloads_as_it_was_saved(kind, tmp_path):
    pipeline = TINY[kind].build()
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    quantize_(backbone, "w4a6")
    backbone.save_pretrained(tmp_path)
    assert same_weights(type(backbone).from_pretrained(tmp_path), backbone)


def test_a_vae_is_saved_with_its_pipeline(tmp_path):
    pipeline = tiny_sd()
    quantize_(pipeline.vae, "w8a8")
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    assert same_weights(loaded.vae, pipeline.vae)


def test_two_recipes_one_after_another_are_not_saved_as_the_second(tmp_path):
    unet = tiny_sd().unet
    quantize_(unet, Recipe(name="middle", keep="none", rules=[Rule(match="[!m]*", keep=True)]))
    assert json.loads(unet.to_json_string())["quantization_config"]["recipe"]["name"] == "middle"
    quantize_(unet, "w8a8")
    with pytest.raises(UserError, match="this UNet2DConditionModel was quantized in place"):
        unet.save_pretrained(tmp_path)


def test_a_model_within_a_module_that_was_quantized_refuses_to_be_saved(tmp_path):
    whole = nn.ModuleDict({"vae": vae(32), "head": nn.Linear(32, 32)})
    quantize_(whole, "w8a8")
    with pytest.raises(UserError, match="this AutoencoderKL was quantized in place"):
        whole["vae"].save_pretrained(tmp_path)


def test_a_plain_module_is_saved_and_pickled_as_ever(tmp_path):
    net, other = (nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)) for _ in range(2))
    for module in (net, other):
        quantize_(module, "w4a6")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert same_weights(net, other)
    assert same_weights(pickle.loads(pickle.dumps(net)), net)


def test_a_diffusers_model_without_a_family_keeps_its_ends_by_both_doors(tmp_path):
    def build():
        torch.manual_seed(0)
        return CogVideoXTransformer3DModel(
            sample_width=8,
            sample_height=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
        )

    model = build()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    model.save_pretrained(tmp_path)
    quantized = {report.plan.name for report in quantize_(model, "w8a8")}
    assert quantized.isdisjoint({layers[0], layers[-1], "patch_embed.text_proj"})
    loaded = type(model).from_pretrained(tmp_path, quantization_config=dmquant.QuantConfig("w8a8"))
    assert same_weights(loaded, model)


def test_a_compiled_module_is_refused():
    with pytest.raises(UserError, match=r"is compiled: quantize it first, then torch\.compile it"):
        quantize_(torch.compile(nn.Sequential(nn.Linear(8, 8))), "w4a6")
