"""ComfyUI's files: what is written is read back bit for bit, and what is no such file is refused in a line."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmquant.convert import plan
from dmquant.errors import UserError
from dmquant.exchange.formats.comfyui import FORMAT
from dmquant.exchange.keys import Target, original
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.recipe import Recipe
from tests.calib.runs import calibrated, captured, recipe_of, saved_and_loaded
from tests.tiny import TINY, tiny_pixart, tiny_sd

FORMATS = {
    "nvfp4": {"weights": "nvfp4"},
    "mxfp8": {"weights": "mxfp8"},
    "float8_e4m3fn": {"weights": "fp8", "granularity": "tensor", "store": "fp32"},
    "float8_e5m2": {"weights": "fp8_e5m2", "granularity": "tensor", "store": "fp32"},
    "int8_tensorwise": {"weights": "int8", "granularity": "channel", "store": "fp32"},
}
WIDE = functools.partial(tiny_pixart, width=64)
WIDE.__name__ = "wide_pixart"
ROTATED = [{"method": "rotate", "size": 16, "order": "regular"}]
BEYOND = {
    "int8_tensorwise": FORMATS["int8_tensorwise"] | {"transforms": ROTATED},
    "asym_w4a8_int8": {
        "weights": "lut4_gaussian",
        "granularity": "group:16",
        "store": "levels",
        "scale": "mse",
        "transforms": ROTATED,
    },
    "svdquant_w4a4": {
        "engine": "comfyui",
        "weights": "int4",
        "granularity": "group:64",
        "store": "bf16",
        "activations": "int4",
        "activation_granularity": "group:64",
        "transforms": [{"method": "lowrank", "rank": 4, "iterations": 0}],
    },
}
"""Formats with transforms beside the weights."""
ROUNDED = {
    "nvfp4": {"activations": "nvfp4"},
    "mxfp8": {"activations": "mxfp8"},
    "int8_tensorwise": {"activations": "int8"},
}
"""Formats with inputs that the engine rounds, without calibration."""
MODELS = {"pixart": tiny_pixart, "sd15": tiny_sd, "sdxl": TINY["sdxl"].build, "sd3": TINY["sd3"].build}
WIDTH = "*down_blocks.*.attentions.0.transformer_blocks.0.attn2.to_k"


def mixed(build):
    """A recipe with layers in every format of ComfyUI that keeps what ComfyUI refuses; layers that it fuses agree."""
    pipeline = build()
    backbone = getattr(pipeline, "unet", None) or pipeline.transformer
    layers, globs = (
        dict(backbone.named_modules()),
        ("*.0.*", ["*.1.*", "*.attn1.to_v"], "*.ff*", "*.attn2.*", "*.to_out*"),
    )
    rules = [{"match": glob, **settings} for glob, settings in zip(globs, FORMATS.values(), strict=True)]
    recipe = Recipe.load("rtn").with_settings(engine="comfyui", rules=rules, activations="none", **FORMATS["mxfp8"])
    refused = [each.name for each in plan(backbone, recipe) if FORMAT.refuses(layers[each.name], each.weights, None)]
    return recipe.with_settings(rules=[*recipe.rules, {"match": [*refused, WIDTH], "keep": True}])


def rounding(format):
    """A recipe for ComfyUI with rounded inputs."""
    return Recipe.load("rtn").with_settings(engine="comfyui", **FORMATS[format] | ROUNDED[format])


def exported(source, path):
    return FORMAT.export(source, path, lambda done, total: None)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_read_back_as_it_was_saved(saved, tmp_path, model):
    source = open_source(saved(mixed(MODELS[model]), MODELS[model]))
    written = exported(source, tmp_path / "out.safetensors")
    foreign = open_foreign(tmp_path / "out.safetensors")
    assert written.exact
    assert set(written.formats) == {*FORMATS, "high precision"}
    names = [f"{name}.weight" for name in source.layers]
    class_name = type(source.backbone).__name__
    for target in original(class_name, source.config, names) or [Target(name, (name,)) for name in names]:
        layers = [source.layer(name.removesuffix(".weight")) for name in target.sources]
        read = foreign.layers[target.name.removesuffix(".weight")]
        assert torch.equal(read.weight(), target.rows([layer.float_weight() for layer in layers]))
        assert read.activations is None


@pytest.mark.parametrize("format", BEYOND)
def test_layers_with_transforms_are_read_back_and_compute_alike(saved, tmp_path, format):
    recipe = Recipe.load("rtn").with_settings(**{"activations": "none"} | BEYOND[format])
    source = open_source(saved(recipe, WIDE))
    exported(source, tmp_path / "out.safetensors")
    foreign = open_foreign(tmp_path / "out.safetensors")
    assert foreign.layers.keys() == source.layers.keys()
    for name, read in foreign.layers.items():
        layer = source.layer(name)
        assert read.format == format
        assert torch.allclose(read.weight(), layer.float_weight(), atol=1e-6)
        assert read.activations == layer.activations
        like = torch.nn.Linear(*reversed(read.shape), bias=layer.bias is not None)
        if layer.bias is not None:
            like.bias = torch.nn.Parameter(layer.bias.float())
        x = torch.randn(7, read.shape[1])
        with torch.no_grad():
            assert torch.allclose(
                read.build(like)(x), layer(x).float(), atol=2e-2 if format == "svdquant_w4a4" else 1e-5
            )


@pytest.mark.parametrize("format", ROUNDED)
def test_layers_round_their_inputs_as_comfyui_does_or_not_at_all(saved, tmp_path, format):
    source = open_source(saved(rounding(format), tiny_pixart))
    exported(source, tmp_path / "out.safetensors")
    state, foreign = load_file(tmp_path / "out.safetensors"), open_foreign(tmp_path / "out.safetensors")
    for name, read in foreign.layers.items():
        assert read.activations == source.layers[name].activations is not None
        assert b"full_precision" not in bytes(state[f"{name}.comfy_quant"].tolist())
        assert read.input_scale is None
        assert read.build is None


@pytest.mark.parametrize(("model", "method"), [("pixart-sigma", "smooth"), ("sd3", None)])
def test_calibrated_models_are_exported_with_shared_bases_and_factors_of_smoothing(tmp_path, model, method):
    case = captured(model, tmp_path / "store")
    settings = {"weights": "nvfp4", "scale": "lean", "rounding": "gptq", "activations": "none"}
    transforms = [{"method": method, "fold": False, "alpha": [0.5]}] if method else []
    recipe = recipe_of([{"match": "*embed*", "keep": True}], **settings, transforms=transforms)
    backbone, done = calibrated(case, recipe, tmp_path / "work")
    saved_and_loaded(model, backbone, done.recipe, tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    exported(source, tmp_path / "out.safetensors")
    state, foreign = load_file(tmp_path / "out.safetensors"), open_foreign(tmp_path / "out.safetensors")
    names = [f"{name}.weight" for name in source.layers]
    targets = original(type(backbone).__name__, source.config, names) or [Target(name, (name,)) for name in names]
    for target in targets:
        layers = [source.layer(name.removesuffix(".weight")) for name in target.sources]
        name = target.name.removesuffix(".weight")
        assert torch.equal(foreign.layers[name].weight(), target.rows([layer.float_weight() for layer in layers]))
        assert (f"{name}.pre_quant_scale" in state) == bool(layers[0].transforms)
    if method:
        assert any(layer.transforms for layer in source.layers.values())
    else:
        assert len(targets) < len(names)


LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def file(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("comfyui") / "model.safetensors"
    exported(open_source(saved(mixed(tiny_pixart))), path)
    return path


def settings_of(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_each_layer_says_its_format_and_that_its_input_is_not_rounded(file):
    state = load_file(file)
    found = {
        name: json.loads(bytes(tensor.tolist())) for name, tensor in state.items() if name.endswith(".comfy_quant")
    }
    assert {settings["format"] for settings in found.values()} == set(FORMATS)
    assert all(settings["full_precision_matrix_mult"] for settings in found.values())
    assert state[f"{LAYER}.weight_scale_2"].shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comfy_quant": settings_of('{"format": "nf4"}')}, "is in the format 'nf4'; known are nvfp4, mxfp8"),
        ({"comfy_quant": settings_of("[]")}, "holds no JSON object"),
        ({"comfy_quant": torch.zeros(3)}, "is no JSON in bytes"),
        ({"comfy_quant": settings_of('{"format": "mxfp8"}')}, "is U8, and mxfp8 has F8_E4M3: the layer is mislabelled"),
        ({"weight_scale_2": None}, "is nvfp4, but has no weight_scale_2"),
        (
            {"weight_scale": torch.zeros(32, 2, dtype=torch.uint8)},
            r"has the shape \[32, 2\], which nvfp4 does not have",
        ),
        ({"weight": torch.zeros(32, 12, dtype=torch.uint8)}, "which nvfp4 does not have"),
        ({"weight": torch.zeros(32, dtype=torch.uint8)}, "which nvfp4 does not have"),
    ],
)
def test_layers_that_are_not_what_they_say_are_refused_in_a_line(file, tmp_path, change, message):
    state = load_file(file) | {f"{LAYER}.{part}": tensor for part, tensor in change.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        open_foreign(tmp_path / "changed.safetensors")
    assert "\n" not in str(raised.value)


def test_a_truncated_file_is_refused(file, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_foreign(tmp_path / "cut.safetensors")


def test_formats_are_read_from_the_header_and_in_the_layout_before_too(file, tmp_path):
    layer = f"model.diffusion_model.{LAYER}"
    weight = torch.randn(8, 16)
    state = {f"{layer}.weight": weight.to(torch.float8_e4m3fn), f"{layer}.weight_scale": torch.tensor(0.5)}
    header = json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}})
    save_file(state, tmp_path / "header.safetensors", {"_quantization_metadata": header})
    old = {f"{layer}.weight": state[f"{layer}.weight"], f"{layer}.scale_weight": torch.tensor(0.5)}
    old |= {f"{layer}.scale_input": torch.tensor(0.25), f"{layer}.bias": torch.zeros(8)}
    save_file({**old, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, tmp_path / "old.safetensors")
    for name in ("header", "old"):
        foreign = open_foreign(tmp_path / f"{name}.safetensors")
        read = foreign.layers[layer]
        assert torch.equal(read.weight(), state[f"{layer}.weight"].float() * 0.5)
        assert read.activations.ranges == 1
        assert read.input_scale().item() == (1.0 if name == "header" else 0.25)
        assert foreign.rest == (() if name == "header" else (f"{layer}.bias",))


@pytest.mark.parametrize(
    ("settings", "build", "message"),
    [
        ({"weights": "fp6"}, tiny_pixart, "it is in fp6_e2m3 with e3m4 scales a group:32, which is none of nvfp4"),
        ({"weights": "nvfp4"}, tiny_sd, "is a Conv2d, and linear layers alone are taken; quantize with --for comfyui"),
        ({"weights": "nvfp4", "activations": "fp6"}, tiny_pixart, "it rounds its input to fp6_e2m3/token, and nvfp4"),
        ({"weights": "nvfp4", "transforms": ["rotate"]}, tiny_pixart, "has the transform rotate"),
        (
            {"weights": "int4", "granularity": "group:64", "store": "bf16"},
            tiny_pixart,
            "has 32 inputs, no multiple of 64",
        ),
    ],
)
def test_layers_that_comfyui_cannot_take_are_named(saved, tmp_path, settings, build, message):
    recipe = Recipe.load("rtn").with_settings(**{"activations": "none"} | settings)
    with pytest.raises(UserError, match=message):
        exported(open_source(saved(recipe, build)), tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_comfyui_tells_the_width_by_is_not_packed(saved, tmp_path):
    recipe = mixed(tiny_sd)
    recipe = recipe.with_settings(rules=[*recipe.rules, {"match": WIDTH, "keep": False, **FORMATS["nvfp4"]}])
    with pytest.raises(UserError, match=r"attn2\.to_k: it tells ComfyUI how wide the model is"):
        exported(open_source(saved(recipe, tiny_sd)), tmp_path / "out.safetensors")


def test_a_recipe_for_comfyui_keeps_what_it_tells_the_width_by_and_says_why(saved, tmp_path):
    recipe = Recipe.load("rtn").with_settings(engine="comfyui", activations="none", weights="nvfp4")
    source = open_source(saved(recipe, tiny_sd))
    exported(source, tmp_path / "out.safetensors")
    (rule,) = [rule for rule in source.recipe.rules if rule.reason and "how wide the model is" in rule.reason]
    assert rule.keep
    assert rule.match == ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]


def test_layers_that_comfyui_has_as_one_share_the_scale_of_the_whole_tensor(saved, tmp_path):
    recipe = Recipe.load("rtn").with_settings(
        engine="comfyui",
        activations="none",
        weights="nvfp4",
        rules=[
            {"match": "*add_*", "weights": "fp8", "granularity": "tensor", "store": "fp32", "scale": "mse"},
            {"match": ["*norm*", "*ff_context*"], "keep": True},
        ],
    )
    source = open_source(saved(recipe, TINY["sd3"].build))
    foreign = exported(source, tmp_path / "out.safetensors")
    block = "transformer_blocks.0.attn."
    bases = [source.layer(f"{block}{name}").scales for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj")]
    assert bases[0].base == bases[1].base == bases[2].base
    assert torch.equal(bases[3].stored, bases[4].stored)
    assert foreign.formats["nvfp4"] > foreign.formats["float8_e4m3fn"] > 0
