"""diffusers casts quantized models, by itself too (`from_pipe`, IP-Adapters, saved LoRAs), and codes survive it."""

import copy
import pickle

import pytest
import torch

import dmquant
from dmquant.convert import quantize_
from dmquant.errors import UserError
from dmquant.recipe import Recipe
from tests.tiny import TINY, tiny_sd

from diffusers import StableDiffusionImg2ImgPipeline  # isort: skip

CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to(dtype=)": lambda model: model.to(dtype=torch.bfloat16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half().to(torch.bfloat16),
    "float": lambda model: model.float().to(torch.bfloat16),
}


def codes(model):
    return {name: one for name, one in model.state_dict().items() if one.dtype == torch.uint8}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def quantized_pipeline():
    pipe = tiny_sd()
    dmquant.quantize_pipeline(pipe, "w4a6")
    return pipe


@pytest.fixture
def pipe(quantized_pipeline):
    return copy.deepcopy(quantized_pipeline)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_changes_no_code_and_gives_what_loading_in_that_dtype_gives(pipe, cast, tmp_path):
    before = copy.deepcopy(codes(pipe.unet))
    pipe.unet.save_pretrained(tmp_path)
    cast(pipe.unet)
    loaded = type(pipe.unet).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(codes(pipe.unet), before)
    assert pipe.unet.dtype == loaded.dtype == torch.bfloat16
    assert pipe.unet.is_quantized


def test_a_cast_of_a_pipeline_casts_every_part(pipe):
    pipe.to(torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    pipe.to("cpu", torch.float32)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_can_be_cast_too(pipe, twin):
    model = twin(pipe.unet).to(torch.float16)
    assert model.dtype == torch.float16
    assert same(codes(model), codes(pipe.unet))


def test_a_quantized_vae_is_upcast_by_its_pipeline():
    pipe = TINY["sdxl"].build()
    quantize_(pipe.vae, Recipe.load("rtn", "fp8", "none").with_settings(keep="none"))
    pipe.vae.register_to_config(force_upcast=True)
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images
    pipe.to(torch.float16)
    images = pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images
    assert pipe.vae.dtype == torch.float16
    assert (images.float() - expected).abs().mean() < 0.02


def test_other_models_are_cast_as_ever(pipe):
    pipe.vae.is_quantized = True
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.vae.to(torch.float16)


def test_a_pipeline_of_another_task_is_made_of_the_same_parts(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet


def ip_adapter(unet, tokens=4, width=16):
    """The weights of an IP-Adapter that adds nothing, as its files have them."""
    cross = [unet.get_submodule(name[:-10]).to_k for name in unet.attn_processors if "attn2" in name]
    deep = cross[0].in_features
    image = {
        "proj.weight": torch.zeros(tokens * deep, width),
        "proj.bias": torch.zeros(tokens * deep),
        "norm.weight": torch.ones(deep),
        "norm.bias": torch.zeros(deep),
    }
    weights = {
        f"{2 * index + 1}.to_{kind}_ip.weight": torch.zeros(k.out_features, deep)
        for index, k in enumerate(cross)
        for kind in "kv"
    }
    return {"image_proj": image, "ip_adapter": weights}


def test_an_ip_adapter_loads_and_a_model_that_holds_one_is_not_saved(pipe, tmp_path):
    before = copy.deepcopy(codes(pipe.unet))
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    assert same(codes(pipe.unet), before)
    with pytest.raises(UserError, match=r"^the folder would not load: .*unload_ip_adapter.*$"):
        pipe.unet.save_pretrained(tmp_path)
    pipe.unload_ip_adapter()
    pipe.unet.save_pretrained(tmp_path)
    assert same(codes(type(pipe.unet).from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("upcast", [True, False])
def test_an_adapter_is_saved_and_loaded_again(pipe, upcast, tmp_path):
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    pipe.unet.save_lora_adapter(tmp_path, upcast_before_saving=upcast)
    other = tiny_sd().unet
    quantize_(other, "w4a6")
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    ours, theirs = (
        {name: one for name, one in model.named_parameters() if "lora_" in name} for model in (pipe.unet, other)
    )
    assert [one.shape for one in ours.values()] == [one.shape for one in theirs.values()]
    assert all(torch.equal(*pair) for pair in zip(ours.values(), theirs.values(), strict=True))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_parameters_are_weights_not_bytes(trainable, embeddings):
    model, options = tiny_sd().unet, {"only_trainable": trainable, "exclude_embeddings": embeddings}
    expected = model.num_parameters(**options)
    reports = quantize_(model, "w4a6")
    layers = [model.get_submodule(report.plan.name) for report in reports]
    quantized = sum(layer.weight.numel() for layer in layers)
    biases = sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    assert model.num_parameters(**options) == expected - (quantized + biases if trainable else 0)


def test_the_footprint_is_that_of_the_stored_bytes(pipe):
    tensors = [*pipe.unet.parameters(), *pipe.unet.buffers()]
    assert pipe.unet.get_memory_footprint() == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", ["sd15", "flux", "sd3", "hunyuan-1.2"])
def test_projections_that_are_quantized_refuse_to_be_fused(kind):
    pipeline = TINY[kind].build()
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    quantize_(backbone, "w8a8")
    before = backbone.state_dict().keys()
    twin = copy.deepcopy(backbone)
    for model in (backbone, twin):
        with pytest.raises(RuntimeError, match=r"^quantized projections cannot be fused: .*dequantize\(\)[^\n]*$"):
            model.fuse_qkv_projections()
        for attention in model.modules():
            if hasattr(attention, "fuse_projections") and isinstance(attention.to_q, dmquant.layers.QuantLinear):
                with pytest.raises(RuntimeError, match=r"^quantized projections cannot be fused"):
                    attention.fuse_projections()
        assert model.state_dict().keys() == before


def test_layerwise_casting_of_a_quantized_model_keeps_its_codes(pipe):
    before = copy.deepcopy(codes(pipe.unet))
    call = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 3, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = pipe.unet(*call).sample
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        cast = pipe.unet(*call).sample
    assert same(codes(pipe.unet), before)
    assert cast.dtype == torch.float32
    assert (cast - expected).norm() < 0.1 * expected.norm()


def test_layerwise_casting_before_quantizing_is_refused():
    model = tiny_sd().unet
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UserError, match=r"^layer \S+ holds Parameter of torch.float8_e4m3fn, .*casting hook.*$"):
        quantize_(model, "w4a6")
    model = tiny_sd().unet
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(UserError, match=r"^layer \S+ has a forward of its own.*$"):
        quantize_(model, "w4a6")
