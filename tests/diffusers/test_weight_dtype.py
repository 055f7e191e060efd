"""A quantized layer without bias is in its model's dtype, to whoever asks: adapters, loaders."""

import pytest
import torch

import dmquant
from tests.tiny import TINY


def unet(dtype=torch.bfloat16):
    return TINY["sd15"].build().unet.eval().to(dtype)


def query_of(model):
    return model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_layers_without_bias_are_of_the_models_dtype(dtype):
    peft = pytest.importorskip("peft")
    model = unet(dtype)
    dmquant.quantize_(model, "w8a8")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    adapted = query_of(model)
    assert adapted.base_layer.bias is None
    assert {one.weight.dtype for one in (adapted.lora_A["default"], adapted.lora_B["default"])} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_in_the_dtype_asked_for(dtype, tmp_path):
    model = unet(torch.float32)
    model.save_pretrained(tmp_path / "float")
    config = dmquant.QuantConfig("w8a8")
    on_the_way = type(model).from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    on_the_way.save_pretrained(tmp_path / "quantized")
    read_back = type(model).from_pretrained(tmp_path / "quantized", dtype=dtype)
    for loaded in (on_the_way, read_back):
        assert query_of(loaded).weight.dtype == dtype
