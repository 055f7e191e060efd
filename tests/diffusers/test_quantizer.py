"""diffusers loads and saves quantized models: bit for bit, in any dtype, in shards, convolutions included."""

import copy
import functools
import importlib
import json
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dmquant
from dmquant.activations import ActivationSpec
from dmquant.convert import plan, quantize_
from dmquant.diffusers.families import families
from dmquant.diffusers.quantizer import QuantConfig, mark_quantized
from dmquant.diffusers.saving import save_pipeline
from dmquant.errors import UsageError, UserError
from dmquant.layers import QuantConv2d, QuantLinear, quantize_layer
from dmquant.pipelines.models.loading import load_pipeline
from dmquant.pipelines.runs.footprint import footprint
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from tests.tiny import IMAGE_SIZE, PIXART_CALL, TINY, tiny_pixart, tiny_sd

from diffusers import ConfigMixin, ModelMixin  # isort: skip
from diffusers.configuration_utils import register_to_config  # isort: skip

BUILDERS = {"pixart": (tiny_pixart, "transformer"), "unet": (tiny_sd, "unet")}
SPLITS = {
    "pixart": {"transformer_blocks.0.attn1.to_q": 5, "transformer_blocks.0.ff.net.2": 64},
    "unet": {"up_blocks.0.resnets.0.conv_shortcut": 20, "up_blocks.1.resnets.0.conv1": 7},
}
RECIPES = {
    "rtn": Recipe.load("rtn"),
    "fp32 scales": Recipe.load("w4a8").with_settings(store="fp32", granularity="channel"),
    "nvfp4": Recipe.load("rtn", w="nvfp4", a="mxfp6"),
    "int3": Recipe.load("rtn", w="int3", a="int8"),
    "split": Recipe.load("w4a6").with_settings(keep="none").splitting(SPLITS["pixart"] | SPLITS["unet"]),
}


def quantized_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (QuantLinear, QuantConv2d))]


def packed(model):
    return {
        f"{name}.{leaf}": tensor
        for name, layer in quantized_layers(model)
        for leaf, tensor in layer.named_parameters()
        if leaf != "bias"
    }


def quantized_backbone(kind, recipe):
    return copy.deepcopy(_quantized(kind, recipe.model_dump_json()))


@functools.cache
def _quantized(kind, recipe):
    build, component = BUILDERS[kind]
    model, recipe = getattr(build(), component), Recipe.model_validate_json(recipe)
    quantize_(model, recipe)
    mark_quantized(model, recipe)
    return model


def static_recipe(ranges=4):
    """Static scales: by channel in attention, by tensor elsewhere, and online where attention ends."""
    rules = [
        {"match": "*attn*", "activation_granularity": "channel"},
        {"match": "*to_out*", "activation_granularity": "token", "activation_scale": "online"},
    ]
    static = {"activation_scale": f"static:{ranges}", "activation_granularity": "tensor"}
    return Recipe.load("w4a6").with_settings(**static, rules=rules)


def static_backbone(kind, ranges=4, splits=MappingProxyType({})):
    """Quantized with scales that differ from range to range, and clip."""
    build, component = BUILDERS[kind]
    model, recipe = getattr(build(), component), static_recipe(ranges).splitting(splits)
    generator = torch.Generator().manual_seed(1)
    for step in plan(model, recipe):
        layer, scale = model.get_submodule(step.name), None
        if step.activations.ranges:
            channels = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.in_channels
            scale = 0.05 + 0.3 * torch.rand(step.activations.scale_shape(channels), generator=generator)
        model.set_submodule(step.name, quantize_layer(layer, step.weights, step.activations, input_scale=scale))
    mark_quantized(model, recipe)
    return model


def example(model, dtype=torch.float32, timesteps=(5, 700)):
    generator = torch.Generator().manual_seed(0)
    size, channels = model.config.sample_size, model.config.in_channels
    latents = torch.randn(2, channels, size, size, generator=generator).to(dtype)
    if hasattr(model, "transformer_blocks"):
        text = torch.randn(2, 5, model.config.caption_channels, generator=generator).to(dtype)
        empty = {"resolution": None, "aspect_ratio": None}
        options = {"timestep": torch.tensor(timesteps), "added_cond_kwargs": empty}
    else:
        text = torch.randn(2, 5, model.config.cross_attention_dim, generator=generator).to(dtype)
        options = {"timestep": torch.tensor(timesteps[0])}
    with torch.no_grad():
        return model(latents, encoder_hidden_states=text, return_dict=False, **options)[0]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("kind", BUILDERS)
def test_save_and_reload_is_bit_equal(kind, recipe, tmp_path):
    model = quantized_backbone(kind, recipe)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        before, after = packed(model), packed(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        if dtype == torch.float32:
            assert torch.equal(example(loaded), example(model))
        else:
            again = type(model).from_pretrained(tmp_path, dtype=dtype)
            assert torch.equal(example(loaded, dtype), example(again, dtype))


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_model_saved_with_splits_has_them_in_its_layers(kind, tmp_path):
    quantized_backbone(kind, RECIPES["split"]).save_pretrained(tmp_path)
    loaded = type(getattr(BUILDERS[kind][0](), BUILDERS[kind][1])).from_pretrained(tmp_path)
    for by_layer in (lambda layer: layer.weight_spec.split, lambda layer: layer.activations.split):
        splits = {name: by_layer(layer) for name, layer in quantized_layers(loaded)}
        assert {name: split for name, split in splits.items() if split is not None} == SPLITS[kind]


def test_static_scales_of_halves_reload_bit_equal(tmp_path):
    model = static_backbone("unet", splits=SPLITS["unet"])
    assert model.get_submodule("up_blocks.1.resnets.0.conv1").input_scale.numel() == 4 * 2 * 4
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for timesteps in ((5, 700), (999, 300)):
        assert torch.equal(example(loaded, timesteps=timesteps), example(model, timesteps=timesteps))


def edit_quantization(folder, edit):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def made_by_version_1(folder):
    edit_quantization(folder, lambda config: config.update(version=1))


def test_convolutions_of_version_1_are_refused_and_linear_layers_load(tmp_path):
    unet, transformer = (quantized_backbone(kind, RECIPES["rtn"]) for kind in ("unet", "pixart"))
    unet.save_pretrained(tmp_path / "unet")
    transformer.save_pretrained(tmp_path / "pixart")
    for kind in BUILDERS:
        made_by_version_1(tmp_path / kind)
    with pytest.raises(UserError, match=r"conv\d was quantized by an older dmquant.*quantize the full-precision model"):
        type(unet).from_pretrained(tmp_path / "unet")
    loaded = type(transformer).from_pretrained(tmp_path / "pixart")
    assert torch.equal(example(loaded), example(transformer))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["version"] == 2


def test_a_model_of_a_later_version_is_refused_in_one_line(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    edit_quantization(tmp_path, lambda config: config.update(version=3))
    with pytest.raises(UserError, match=r"^this model was quantized by a later dmquant.*version 3.*$"):
        type(model).from_pretrained(tmp_path)


def test_a_recipe_saved_before_there_was_keep_asks_no_family(tmp_path):
    """Such a model has layers quantized that its family keeps, as `quantize_` once made them."""
    recipe = RECIPES["rtn"].with_settings(keep="none")
    model = quantized_backbone("pixart", recipe)
    assert isinstance(model.proj_out, QuantLinear)
    model.save_pretrained(tmp_path)
    edit_quantization(tmp_path, lambda config: config["recipe"].pop("keep"))
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(example(loaded), example(model))
    assert loaded.hf_quantizer.quantization_config.recipe == recipe


def test_a_recipe_in_config_json_that_is_none_is_a_clear_error(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    edit_quantization(tmp_path, lambda config: config["recipe"].update(weights="fp44"))
    with pytest.raises(UserError, match=r"^recipe: weights: unknown format 'fp44'.*$"):
        type(model).from_pretrained(tmp_path)


def test_one_configuration_quantizes_models_of_several_families(tmp_path):
    config = QuantConfig("w4a6")
    for kind, (build, component) in BUILDERS.items():
        model = getattr(build(), component)
        model.save_pretrained(tmp_path / kind)
        loaded = type(model).from_pretrained(tmp_path / kind, quantization_config=config)
        expected = {step.name for step in plan(model, Recipe.load("w4a6"))}
        assert {name for name, _ in quantized_layers(loaded)} == expected


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
    loaded = type(float_model).from_pretrained(tmp_path, dtype=dtype, quantization_config=QuantConfig("w4a6"))
    expected = packed(quantized_backbone(kind, Recipe.load("w4a6")))
    got = packed(loaded)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        example(type(loaded).from_pretrained(tmp_path / "again", dtype=dtype), dtype), example(loaded, dtype)
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QuantConfig("gptq"), "recipe 'gptq' needs calibration data"),
        (QuantConfig("default"), "recipe 'default' needs calibration data"),
        (QuantConfig("rtn", keep="*"), "quantizes none of the layers of PixArtTransformer2DModel"),
    ],
)
def test_quantizing_while_loading_refuses_what_quantize_refuses(config, said, tmp_path):
    model = tiny_pixart().transformer
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=said):
        type(model).from_pretrained(tmp_path, quantization_config=config)


def test_files_are_read_at_the_same_time_only_where_they_are_packed(tmp_path, monkeypatch):
    loading, calls = importlib.import_module("diffusers.models.modeling_utils"), []
    together = loading._load_shard_files_with_threadpool

    def counted(*args, **named):
        calls.append(1)
        return together(*args, **named)

    monkeypatch.setattr(loading, "HF_ENABLE_PARALLEL_LOADING", True)
    monkeypatch.setattr(loading, "_load_shard_files_with_threadpool", counted)
    unet = tiny_sd().unet
    unet.save_pretrained(tmp_path / "float", max_shard_size="20KB")
    type(unet).from_pretrained(tmp_path / "float", quantization_config=QuantConfig("w4a6"))
    assert not calls
    quantize_(unet, "w4a6")
    unet.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert torch.equal(example(type(unet).from_pretrained(tmp_path / "quantized")), example(unet))
    assert calls


def test_weights_that_a_device_map_sends_to_disk_are_not_left_in_full_precision(tmp_path):
    pytest.importorskip("accelerate")
    unet = tiny_sd().unet
    unet.save_pretrained(tmp_path / "float")
    places = {name: "cpu" for name, _ in unet.named_children()} | {"mid_block": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "disk"}
    with pytest.raises(UserError, match=r"^\S+ went to disk in full precision: .*save the model.*$"):
        type(unet).from_pretrained(tmp_path / "float", quantization_config=QuantConfig("w4a6"), **options)
    quantize_(unet, "w4a6")
    unet.save_pretrained(tmp_path / "quantized")
    loaded = type(unet).from_pretrained(tmp_path / "quantized", **options)
    assert torch.equal(example(loaded), example(unet))


def test_a_layer_of_two_names_is_saved_and_loaded(tmp_path):
    class Shared(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width=64):
            super().__init__()
            self.first, self.middle, self.last = (torch.nn.Linear(width, width) for _ in range(3))
            self.again = self.middle

        def forward(self, x):
            return self.last(self.again(self.middle(self.first(x))))

    model, x = Shared(), torch.randn(2, 64)
    model.save_pretrained(tmp_path / "float", safe_serialization=False)
    assert [report.plan.name for report in quantize_(model, "w4a6")] == ["middle"]
    model.save_pretrained(tmp_path / "quantized")
    loaded = Shared.from_pretrained(tmp_path / "quantized")
    on_the_way = Shared.from_pretrained(tmp_path / "float", quantization_config=QuantConfig("w4a6"))
    for one in (loaded, on_the_way):
        assert one.again is one.middle
        assert torch.equal(one.middle.qweight, model.middle.qweight)
        assert torch.allclose(one(x), model(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_is_quantized_while_it_is_read(dtype, tmp_path):
    model = TINY["flux"].build().transformer
    model.save_config(tmp_path)
    save_file(model.state_dict(), tmp_path / "one.safetensors")
    loaded = type(model).from_single_file(
        str(tmp_path / "one.safetensors"),
        config=str(tmp_path),
        quantization_config=QuantConfig("w4a6"),
        dtype=dtype,
    )
    quantize_(model, "w4a6")
    before, after = packed(model), packed(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "saved")
    assert packed(type(model).from_pretrained(tmp_path / "saved")).keys() == before.keys()


def test_a_configuration_keeps_one_pattern_as_well_as_several():
    assert QuantConfig("rtn", keep="proj_*").recipe == QuantConfig("rtn", keep=("proj_*",)).recipe


def test_names_that_other_quantizers_have_for_a_setting():
    ours = QuantConfig("rtn", w="fp8_e4m3", a="int8").recipe.with_settings(granularity="group:32")
    theirs = QuantConfig("rtn", weights_dtype="float8_e4m3fn", activations_dtype=torch.int8, group_size=32).recipe
    assert theirs == ours
    assert QuantConfig(ours, weights_dtype=torch.float8_e5m2).recipe == ours.with_settings(weights="fp8_e5m2")
    assert QuantConfig("rtn", weights_dtype="int4", group_size=-1).recipe.granularity == "channel"
    config = QuantConfig("rtn", modules_to_not_convert=["attn1", "proj_out"])
    names = ["blocks.0.attn1.to_q", "attn1", "blocks.0.proj_out", "proj_out", "blocks.0.attn1_x", "blocks.0.attn2.to_q"]
    kept = [name for name, settings in config.recipe.settings_by_layer(names).items() if settings is None]
    assert kept == names[:4]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"weight_dtype": "int8"}, "unknown keyword 'weight_dtype': did you mean 'weights_dtype'"),
        ({"W": "int8", "keeps": "a"}, "unknown keyword 'W'"),
        ({"w": "int8", "weights_dtype": "int8"}, "w and weights_dtype are one setting"),
        ({"group_size": "all"}, "group_size is 'all'"),
        ({"weights_dtype": "float9"}, "format 'fp9'"),
    ],
)
def test_keywords_that_make_no_sense_are_refused(keywords, said):
    with pytest.raises(UsageError, match=said):
        QuantConfig("rtn", **keywords)


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


def test_config_holds_the_recipe_and_no_key_that_its_version_has_not(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["quant_method"] == "dmquant"
    rules = [{"match": list(families()["pixart"].keep), "keep": True}]
    saved = config["quantization_config"]["recipe"]
    assert Recipe.model_validate(saved) == RECIPES["rtn"].with_settings(keep="none", rules=rules)
    config["quantization_config"]["from_the_future"] = 1
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds 'from_the_future', which version 2 does not have"):
        type(model).from_pretrained(tmp_path)


def test_a_config_that_does_not_fit_its_weights_is_a_clear_error(tmp_path):
    model = quantized_backbone("pixart", RECIPES["rtn"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("group:32", "group:16"))
    with pytest.raises(UserError, match=r"scale. in shape \[32, 1\], which its config.json says is \[32, 2\]"):
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
        "from tests.diffusers.test_quantizer import example\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + '/model')\n"
        "assert torch.equal(example(pipe.transformer), torch.load(sys.argv[1] + '/expected.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_a_folder_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^there is no folder \S+/none$"):
        load_pipeline(tmp_path / "none")


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
    with pytest.raises(UserError, match="requantize=True"):
        pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(example(pipeline.unet), plain)


class TestStaticActivations:
    """Activation scales fixed at calibration, for each timestep range, in a diffusers model."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", BUILDERS)
    def test_save_and_reload_is_bit_equal(self, kind, dtype, tmp_path):
        model = static_backbone(kind)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        before, after = packed(model), packed(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        twin = model if dtype == torch.float32 else type(model).from_pretrained(tmp_path, dtype=dtype)
        for timesteps in ((5, 700), (999, 300)):
            assert torch.equal(example(loaded, dtype, timesteps), example(twin, dtype, timesteps))

    @pytest.mark.parametrize("build", [tiny_pixart, tiny_sd])
    def test_a_whole_pipeline_reloads_bit_equal(self, build, tmp_path):
        kind = "pixart" if build is tiny_pixart else "unet"
        pipeline = build()
        setattr(pipeline, BUILDERS[kind][1], static_backbone(kind))
        save_pipeline(pipeline, tmp_path)
        options = PIXART_CALL if kind == "pixart" else {}

        def latents(pipe):
            pipe.set_progress_bar_config(disable=True)
            call = {"num_inference_steps": 3, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "output_type": "latent"}
            return pipe("a red cat", generator=torch.Generator().manual_seed(0), **call, **options).images

        assert torch.equal(latents(load_pipeline(tmp_path)), latents(pipeline))

    @pytest.mark.parametrize("kind", BUILDERS)
    def test_the_timestep_decides_and_is_clamped_to_the_schedule(self, kind):
        """The layers' inputs depend on the timestep too, so the ranges that they look up are compared."""
        model = static_backbone(kind)
        ranges = next(layer.timestep_ranges for layer in model.modules() if getattr(layer, "timestep_ranges", None))
        for timestep, index in ((0, 0), (249, 0), (250, 1), (999, 3), (5000, 3), (-3, 0)):
            example(model, timesteps=(timestep, timestep))
            assert set(ranges.of_rows[4].tolist()) == {index}

    def test_a_mixed_batch_is_its_rows_one_by_one(self):
        model = static_backbone("pixart")
        mixed = example(model, timesteps=(5, 700))
        assert torch.allclose(mixed[0], example(model, timesteps=(5, 5))[0], atol=1e-5)
        assert torch.allclose(mixed[1], example(model, timesteps=(700, 700))[1], atol=1e-5)

    def test_positional_and_keyword_timesteps_are_the_same(self):
        model = static_backbone("unet")
        sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32)
        with torch.no_grad():
            positional = model(sample, 700, text, return_dict=False)[0]
            assert torch.equal(
                model(sample, timestep=700, encoder_hidden_states=text, return_dict=False)[0], positional
            )

    def test_two_models_in_one_process_keep_their_timesteps_apart(self):
        one, two = static_backbone("unet"), static_backbone("unet")
        expected = example(one, timesteps=(5, 5))

        def run_the_other_at_another_timestep(*_):
            example(one, timesteps=(900, 900))

        two.register_forward_pre_hook(run_the_other_at_another_timestep)  # after it was told its own timestep
        assert torch.equal(example(two, timesteps=(5, 5)), expected)

    def test_one_range_needs_no_timestep(self):
        model = static_backbone("pixart", ranges=1)
        assert not model._forward_pre_hooks
        assert example(model).isfinite().all()

    def test_offloading_by_layer_gives_the_same_output(self):
        accelerate = pytest.importorskip("accelerate")
        model = static_backbone("unet")
        expected = example(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(example(model), expected)

    def test_lora_works_on_top(self):
        pytest.importorskip("peft")
        from peft import LoraConfig

        model = static_backbone("unet")
        plain = example(model)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
        assert not torch.allclose(example(model), plain, atol=1e-4)
        model.disable_adapters()
        assert torch.equal(example(model), plain)

    def test_loading_full_precision_weights_cannot_fit_them(self, tmp_path):
        tiny_pixart().transformer.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="needs calibration data"):
            type(tiny_pixart().transformer).from_pretrained(tmp_path, quantization_config=QuantConfig(static_recipe()))

    def test_a_backbone_without_a_timestep_cannot_have_several_ranges(self):
        class Clockless(torch.nn.Module):
            def forward(self, sample):
                return sample

        model, spec = Clockless(), ActivationSpec.parse("fp6", "tensor", scale="static:2")
        weights = WeightSpec.parse("fp4")
        model.layer = quantize_layer(torch.nn.Linear(8, 8), weights, spec, input_scale=torch.ones(2, 1))
        with pytest.raises(UsageError, match="Clockless is called without a timestep"):
            mark_quantized(model, static_recipe())
