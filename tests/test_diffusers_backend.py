"""diffusers loads and saves quantized models: bit for bit, in any dtype, in shards, convolutions included."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import dmquant
from dmquant.convert import footprint, quantize_
from dmquant.diffusers_backend import QuantConfig, load_pipeline, mark_quantized, save_pipeline
from dmquant.errors import UserError
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.recipe import Recipe
from tests.tiny import tiny_pixart, tiny_sd

BUILDERS = {"pixart": (tiny_pixart, "transformer"), "unet": (tiny_sd, "unet")}
RECIPES = {
    "rtn": Recipe.load("rtn"),
    "fp32 scales": Recipe.load("w4a8").with_settings(store="fp32", granularity="channel"),
    "nvfp4": Recipe.load("rtn", w="nvfp4", a="mxfp6"),
    "int3": Recipe.load("rtn", w="int3", a="int8"),
}


def packed(model):
    return {
        f"{name}.{leaf}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantConv2d))
        for leaf, tensor in layer.named_parameters()
        if leaf != "bias"
    }


def quantized_backbone(kind, recipe):
    build, component = BUILDERS[kind]
    model = getattr(build(), component)
    quantize_(model, recipe)
    mark_quantized(model, recipe)
    return model


def example(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    size, channels = model.config.sample_size, model.config.in_channels
    latents = torch.randn(2, channels, size, size, generator=generator).to(dtype)
    if hasattr(model, "transformer_blocks"):
        text = torch.randn(2, 5, model.config.caption_channels, generator=generator).to(dtype)
        empty = {"resolution": None, "aspect_ratio": None}
        options = {"timestep": torch.tensor([5, 700]), "added_cond_kwargs": empty}
    else:
        text = torch.randn(2, 5, model.config.cross_attention_dim, generator=generator).to(dtype)
        options = {"timestep": torch.tensor(5)}
    with torch.no_grad():
        return model(latents, encoder_hidden_states=text, return_dict=False, **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("kind", BUILDERS)
def test_save_and_reload_is_bit_equal(kind, recipe, dtype, tmp_path):
    model = quantized_backbone(kind, recipe)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    before, after = packed(model), packed(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if dtype == torch.float32:
        assert torch.equal(example(loaded), example(model))
    else:
        again = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        assert torch.equal(example(loaded, dtype), example(again, dtype))


@pytest.mark.parametrize("kind", BUILDERS)
def test_shards_reload_bit_equal(kind, tmp_path):
    model = quantized_backbone(kind, RECIPES["rtn"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(example(type(model).from_pretrained(tmp_path)), example(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_quantizing_while_loading_gives_the_same_model(kind, dtype, shard, tmp_path):
    build, component = BUILDERS[kind]
    float_model = getattr(build(), component)
    float_model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = type(float_model).from_pretrained(tmp_path, torch_dtype=dtype, quantization_config=QuantConfig("w4a6"))
    expected = packed(quantized_backbone(kind, Recipe.load("w4a6")))
    got = packed(loaded)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        example(type(loaded).from_pretrained(tmp_path / "again", torch_dtype=dtype), dtype), example(loaded, dtype)
    )


def test_convolutions_of_a_unet_are_quantized():
    layers = [layer for layer in quantized_backbone("unet", RECIPES["rtn"]).modules() if isinstance(layer, QuantConv2d)]
    assert len(layers) > 5


def test_the_file_is_as_small_as_the_footprint_says(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    with safe_open(file, "pt") as content:
        stored = sum(content.get_tensor(name).nbytes for name in content.keys())  # noqa: SIM118
    assert stored == sum(p.nbytes for p in model.state_dict().values())
    assert footprint(model).bytes - stored == sum(b.nbytes for b in model.buffers())  # recomputed, not stored


def test_config_holds_the_recipe_and_ignores_later_keys(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["quant_method"] == "dmquant"
    assert Recipe.model_validate(config["quantization_config"]["recipe"]) == RECIPES["rtn"]
    config["quantization_config"]["from_the_future"] = 1
    file.write_text(json.dumps(config))
    assert torch.equal(example(type(model).from_pretrained(tmp_path)), example(model))


def test_a_config_that_does_not_fit_its_weights_is_a_clear_error(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("group:64", "group:16"))
    with pytest.raises(UserError, match="the folder does not hold one model"):
        type(model).from_pretrained(tmp_path)


def test_a_whole_pipeline_reloads_in_a_process_that_only_imports_dmquant(tmp_path):
    pipeline = tiny_pixart()
    quantize_(pipeline.transformer, "rtn")
    mark_quantized(pipeline.transformer, Recipe.load("rtn"))
    save_pipeline(pipeline, tmp_path / "model")
    torch.save(example(pipeline.transformer), tmp_path / "expected.pt")
    script = (
        "import sys, dmquant, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "from tests.test_diffusers_backend import example\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + '/model')\n"
        "assert torch.equal(example(pipe.transformer), torch.load(sys.argv[1] + '/expected.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_no_local_path_is_left_in_a_pipeline_folder(tmp_path):
    tiny_pixart(tmp_path / "source")
    pipeline = load_pipeline(tmp_path / "source")
    quantize_(pipeline.transformer, "rtn")
    mark_quantized(pipeline.transformer, Recipe.load("rtn"))
    save_pipeline(pipeline, tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
        assert "_name_or_path" not in file.read_text(), file


def test_a_folder_saved_in_bfloat16_loads_without_naming_a_dtype(tmp_path):
    save_pipeline(tiny_pixart().to(torch.bfloat16), tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert {component.dtype for component in (pipeline.text_encoder, pipeline.transformer, pipeline.vae)} == {
        torch.float32
    }


def test_importing_dmquant_imports_no_torch_and_the_public_names_resolve():
    script = "import sys, dmquant; assert 'torch' not in sys.modules; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in dmquant.__all__:
        assert callable(getattr(dmquant, name))


def test_lora_weights_load_onto_a_quantized_unet_and_refuse_to_fuse(tmp_path):
    pytest.importorskip("peft")
    pipeline = tiny_sd()
    from peft import LoraConfig

    donor = tiny_sd()
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor.unet))
    type(donor).save_lora_weights(tmp_path, unet_lora_layers=state)
    quantize_(pipeline.unet, "rtn")
    mark_quantized(pipeline.unet, Recipe.load("rtn"))
    plain = example(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    assert not torch.allclose(example(pipeline.unet), plain, atol=1e-4)
    with pytest.raises(RuntimeError, match="keep the LoRA adapter unfused"):
        pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(example(pipeline.unet), plain)
