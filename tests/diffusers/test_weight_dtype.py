"""A quantized layer without bias is in its model's dtype, to whoever asks: adapters, fused projections, loaders."""

import pytest
import torch

import dmquant
from tests.tiny import TINY


def unet(dtype=torch.bfloat16):
    return TINY["sd15"].build().unet.eval().to(dtype)


def query_of(model):
    return model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


def inputs(config):
    torch.manual_seed(0)
    noise = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    return noise.bfloat16(), 500, torch.randn(1, 3, config.cross_attention_dim).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_layers_without_bias_are_of_the_models_dtype(dtype):
    peft = pytest.importorskip("peft")
    model = unet(dtype)
    dmquant.quantize_(model, "w8a8")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    adapted = query_of(model)
    assert adapted.base_layer.bias is None
    assert {one.weight.dtype for one in (adapted.lora_A["default"], adapted.lora_B["default"])} == {dtype}


@torch.no_grad()
def test_fused_projections_compute_what_the_layers_did():
    model = unet()
    x = inputs(model.config)
    dmquant.quantize_(model, dmquant.Recipe.load("rtn", "fp8", "none"))
    apart = model(*x).sample
    model.fuse_qkv_projections()
    fused = model(*x).sample
    assert fused.dtype == torch.bfloat16
    assert (fused - apart).float().norm() < 0.02 * apart.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_in_the_dtype_asked_for(dtype, tmp_path):
    model = unet(torch.float32)
    model.save_pretrained(tmp_path / "float")
    config = dmquant.QuantConfig("w8a8")
    on_the_way = type(model).from_pretrained(tmp_path / "float", quantization_config=config, torch_dtype=dtype)
    on_the_way.save_pretrained(tmp_path / "quantized")
    read_back = type(model).from_pretrained(tmp_path / "quantized", torch_dtype=dtype)
    for loaded in (on_the_way, read_back):
        assert query_of(loaded).weight.dtype == dtype
