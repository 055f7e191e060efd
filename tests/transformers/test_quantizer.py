"""Text encoders quantize on load, save, reload, cast and take adapters as backbones do, by transformers' own calls."""

import copy
import json
import re

import pytest
import torch
import transformers
from torch import nn

import dmquant
from dmquant.convert import quantize_
from dmquant.diffusers.saving import save_pipeline
from dmquant.errors import UsageError, UserError
from dmquant.layers import QuantLinear
from dmquant.pipelines.models.loading import load_pipeline
from tests.tiny import tiny_pixart, tiny_sd
from tests.tiny.parts import t5

from diffusers import DiffusionPipeline, PipelineQuantizationConfig  # isort: skip

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 24,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 3, "vocab_size": 24}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 24,
    "projection_dim": 32,
    "max_position_embeddings": 16,
}
BERT = {name: CLIP[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
PIXTRAL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
MISTRAL = DECODER | {"model_type": "mistral", "num_hidden_layers": 12}
ENCODERS = {
    "T5EncoderModel": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, {"encoder.block.2"}),
    "UMT5EncoderModel": ("UMT5Config", T5, {"encoder.block.2"}),
    "CLIPTextModel": ("CLIPTextConfig", CLIP, {"encoder.layers.2", "encoder.layers.3"}),
    "CLIPTextModelWithProjection": (
        "CLIPTextConfig",
        CLIP,
        {"text_model.encoder.layers.2", "text_model.encoder.layers.3", "text_projection"},
    ),
    "BertModel": ("BertConfig", BERT, {"encoder.layer.3", "pooler.dense"}),
    "Gemma2Model": ("Gemma2Config", DECODER, {"layers.2", "layers.3"}),
    "LlamaModel": ("LlamaConfig", DECODER | {"num_hidden_layers": 8}, {"layers.5", "layers.6", "layers.7"}),
    "Qwen3ForCausalLM": ("Qwen3Config", DECODER, {"model.layers.2", "model.layers.3", "lm_head"}),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {"text_config": DECODER | {"rope_parameters": ROPE}, "vision_config": VISION},
        {"model.language_model.layers.1", "model.language_model.layers.3", "lm_head", "model.visual"},
    ),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {"text_config": MISTRAL, "vision_config": PIXTRAL | {"model_type": "pixtral"}},
        {"model.language_model.layers.9", "lm_head", "model.vision_tower", "model.multi_modal_projector"},
    ),
}
"""By class: its configuration, and the parts whose layers stay in high precision. Blocks 8, 17 and 26 of Qwen3, and 19
and 29 of Mistral, are in larger models only."""
IDS = torch.tensor([[3, 5, 7, 2], [4, 6, 2, 0]])


def encoder(name, seed=0):
    torch.manual_seed(seed)
    config, settings, _ = ENCODERS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def pixart():
    pipeline = tiny_pixart()
    torch.manual_seed(1)
    pipeline.text_encoder = t5(pipeline.tokenizer, blocks=3).eval()
    return pipeline


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def quantized(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_on_load_is_the_one_in_place_and_reloads_bit_equal(name, tmp_path):
    plain, kept = encoder(name), ENCODERS[name][2]
    plain.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    loaded = type(plain).from_pretrained(tmp_path / "float", quantization_config=dmquant.QuantConfig("w4a16")).eval()
    layers = {layer for layer, module in plain.named_modules() if isinstance(module, nn.Linear)}
    left = layers - quantized(loaded)
    assert left == {layer for layer in layers if any(f"{layer}.".startswith(f"{part}.") for part in kept)} != layers
    quantize_(plain, "w4a16")
    assert same(loaded, plain)
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    again = type(plain).from_pretrained(tmp_path / "packed").eval()
    assert same(again, plain)
    assert again.hf_quantizer.quantization_config.to_dict() == loaded.hf_quantizer.quantization_config.to_dict()
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], plain(IDS)[0])


def test_every_part_of_a_pipeline_by_one_configuration(tmp_path):
    pixart().save_pretrained(tmp_path / "float")
    config = PipelineQuantizationConfig(quant_backend="dmquant", quant_kwargs={"recipe": "w8a16"})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    by_hand = pixart()
    for part in ("transformer", "text_encoder", "vae"):
        quantize_(getattr(by_hand, part), "w8a16")
        assert same(getattr(pipeline, part), getattr(by_hand, part)), part
    save_pipeline(pipeline, tmp_path / "packed")
    again = load_pipeline(tmp_path / "packed")  # which checks that each part is what its config.json says
    assert all(same(getattr(again, part), getattr(pipeline, part)) for part in ("transformer", "text_encoder", "vae"))
    kept = {name for name, layer in again.vae.named_modules() if type(layer) is nn.Conv2d}
    assert {"encoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv"} < kept
    assert not any(name.startswith("decoder.up_blocks.0") for name in kept)


def test_parts_by_their_own_recipes(tmp_path):
    tiny_sd().save_pretrained(tmp_path)
    mapping = {"text_encoder": dmquant.QuantConfig("w4a8"), "unet": dmquant.QuantConfig("w8a8")}
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    by_hand = tiny_sd()
    quantize_(by_hand.text_encoder, "w4a8"), quantize_(by_hand.unet, "w8a8")
    assert same(pipeline.text_encoder, by_hand.text_encoder)
    assert same(pipeline.unet, by_hand.unet)
    assert same(pipeline.vae, by_hand.vae)


def test_an_encoder_in_place_is_saved_as_it_is_and_so_is_its_copy(tmp_path):
    pipeline = tiny_sd()
    quantize_(pipeline.text_encoder, "w8a16")
    for number, one in enumerate((pipeline.text_encoder, copy.deepcopy(pipeline.text_encoder))):
        one.save_pretrained(tmp_path / str(number))
        assert same(type(one).from_pretrained(tmp_path / str(number)), pipeline.text_encoder)


def test_two_recipes_one_after_another_are_not_saved_as_the_second(tmp_path):
    one = encoder("T5EncoderModel")
    quantize_(one.encoder.block[0], "w8a16")
    quantize_(one, "w4a16")
    with pytest.raises(UserError, match="this T5EncoderModel was quantized in place"):
        one.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["T5EncoderModel", "CLIPTextModel"])
def test_casts_change_no_code_and_the_encoder_goes_on_in_the_new_dtype(name):
    one = encoder(name)
    quantize_(one, "w8a16")
    codes = {key: value.clone() for key, value in one.state_dict().items() if value.dtype == torch.uint8}
    expected = one(IDS)[0]
    state = one.to(torch.bfloat16).state_dict()
    assert all(torch.equal(state[key], codes[key]) for key in codes)
    assert one(IDS)[0].dtype == torch.bfloat16
    assert (one(IDS)[0].float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert one.float().dtype == torch.float32
    assert one.double().half().dtype == torch.float16


def test_on_load_weights_are_quantized_as_transformers_gives_them_in_the_dtype_asked_for(tmp_path):
    one = encoder("T5EncoderModel")
    one.save_pretrained(tmp_path)
    config = dmquant.QuantConfig("w8a16")
    loaded = type(one).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config).eval()
    one.to(torch.bfloat16)
    quantize_(one, "w8a16")
    assert same(loaded, one)
    assert torch.equal(loaded(IDS)[0], one(IDS)[0])


def test_an_encoder_counts_weights_not_bytes_and_goes_back_to_float(tmp_path):
    one, plain = encoder("T5EncoderModel"), encoder("T5EncoderModel")
    quantize_(one, "w4a16")
    assert one.num_parameters() == plain.num_parameters()
    assert one.get_memory_footprint() < 0.6 * plain.get_memory_footprint()
    expected = one(IDS)[0]
    one.dequantize()
    assert torch.equal(one(IDS)[0], expected)
    one.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(type(one).from_pretrained(tmp_path), one)


def test_an_adapter_on_a_quantized_encoder_is_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    one = encoder("CLIPTextModel")
    quantize_(one, "w4a16")
    one.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    one.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = encoder("CLIPTextModel")
    quantize_(again, "w4a16")
    again.load_adapter(str(tmp_path))
    assert torch.equal(again.eval()(IDS)[0], one.eval()(IDS)[0])


def test_what_an_encoder_keeps_must_be_known_or_named(tmp_path):
    unknown = transformers.RobertaModel(transformers.RobertaConfig(**BERT))
    unknown.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^of a RobertaModel it is not known which layers .*keep: none; known are t5"):
        transformers.RobertaModel.from_pretrained(tmp_path, quantization_config=dmquant.QuantConfig("w8a16"))
    recipe = dmquant.Recipe.load("w8a16").with_settings(keep="none").keeping(["pooler.*"])
    loaded = transformers.RobertaModel.from_pretrained(tmp_path, quantization_config=dmquant.QuantConfig(recipe))
    assert len(quantized(loaded)) == 6 * BERT["num_hidden_layers"]


@pytest.mark.parametrize(
    ("config", "said"),
    [("default", "recipe 'default' needs calibration data"), ("rtn", "quantizes none of the layers of T5EncoderModel")],
)
def test_an_encoder_refuses_what_a_backbone_refuses(config, said, tmp_path):
    encoder("T5EncoderModel").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=re.escape(said)):
        transformers.T5EncoderModel.from_pretrained(
            tmp_path, quantization_config=dmquant.QuantConfig(config, keep="*" if config == "rtn" else ())
        )


def test_a_packed_encoder_that_is_not_what_its_config_says_is_refused(tmp_path):
    pipeline = pixart()
    quantize_(pipeline.text_encoder, "w8a16")
    save_pipeline(pipeline, tmp_path)
    path = tmp_path / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["recipe"]["rules"] = []
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"text_encoder is quantized by its config.json, but holds no packed weight"):
        load_pipeline(tmp_path, verify=False)
