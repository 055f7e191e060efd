"""ComfyUI's files by comfy-kitchen, the library that decodes and multiplies them in ComfyUI, on the CPU.

Layers are loaded as `_load_quantized_module` of ComfyUI's comfy/ops.py loads them. The package is installed apart from
what the other tests need, see .ci/run.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

kitchen = pytest.importorskip("comfy_kitchen", reason="installed apart from what the other tests need, see .ci/run")

from comfy_kitchen.backends.eager.svdquant import _unpack_int4_row_major, quantize_svdquant_w4a4
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    QuantizedTensor,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorCoreSVDQuantW4A4Layout,
    TensorWiseINT8Layout,
)

from dmquant.activations import fake_quantize
from dmquant.exchange.formats.comfyui import FORMAT
from dmquant.exchange.formats.comfyui.layouts import LAYOUTS
from dmquant.exchange.keys import Target, original
from dmquant.pipelines.models.opening import open_source
from dmquant.recipe import Recipe
from tests.exchange.test_comfyui import BEYOND, MODELS, ROUNDED, WIDE, mixed, rounding
from tests.tiny import tiny_pixart

STORED = {
    "float8_e4m3fn": (TensorCoreFP8Layout, torch.float8_e4m3fn, {"scale": ("weight_scale", None)}),
    "float8_e5m2": (TensorCoreFP8Layout, torch.float8_e5m2, {"scale": ("weight_scale", None)}),
    "nvfp4": (
        TensorCoreNVFP4Layout,
        torch.uint8,
        {"scale": ("weight_scale_2", None), "block_scale": ("weight_scale", torch.float8_e4m3fn)},
    ),
    "mxfp8": (TensorCoreMXFP8Layout, torch.float8_e4m3fn, {"scale": ("weight_scale", torch.float8_e8m0fnu)}),
    "int8_tensorwise": (TensorWiseINT8Layout, torch.int8, {"scale": ("weight_scale", None)}),
    "asym_w4a8_int8": (
        AsymW4A8Int8Layout,
        torch.int8,
        {
            "scale": ("weight_s_rel", None),
            "s_channel": ("weight_s_channel", None),
            "codebook": ("weight_codebook", None),
        },
    ),
    "svdquant_w4a4": (
        TensorCoreSVDQuantW4A4Layout,
        torch.int8,
        {
            "scale": ("weight_scale", None),
            "proj_down": ("proj_down", None),
            "proj_up": ("proj_up", None),
            "smooth_factor": ("smooth_factor", None),
        },
    ),
}
OPTIONS = "convrot", "convrot_groupsize", "group_size"


def kitchen_weight(state, name, shape):
    settings = json.loads(state[f"{name}.comfy_quant"].numpy().tobytes())
    layout, dtype, parts = STORED[settings["format"]]
    weight = state[f"{name}.weight"]
    assert weight.dtype == dtype
    tensors = {each: state[f"{name}.{part}"] for each, (part, _) in parts.items()}
    tensors = {each: tensor if (to := parts[each][1]) is None else tensor.view(to) for each, tensor in tensors.items()}
    options = {option: settings[option] for option in OPTIONS if option in settings}
    params = layout.Params(**tensors, **options, orig_dtype=torch.float32, orig_shape=shape)
    return QuantizedTensor(weight, layout.__name__, params)


@pytest.mark.parametrize("model", MODELS)
def test_kitchen_decodes_what_dmquant_computes_with(saved, tmp_path, model):
    source = open_source(saved(mixed(MODELS[model]), MODELS[model]))
    FORMAT.export(source, tmp_path / "out.safetensors", lambda done, total: None)
    state = load_file(tmp_path / "out.safetensors")
    names = [f"{name}.weight" for name in source.layers]
    class_name = type(source.backbone).__name__
    for target in original(class_name, source.config, names) or [Target(name, (name,)) for name in names]:
        layers = [source.layer(name.removesuffix(".weight")) for name in target.sources]
        ours = target.rows([layer.float_weight() for layer in layers])
        theirs = kitchen_weight(state, target.name.removesuffix(".weight"), tuple(ours.shape))
        assert torch.equal(theirs.dequantize(), ours)


@pytest.mark.parametrize("format", ROUNDED)
def test_kitchen_rounds_inputs_and_multiplies_as_dmquant_does(saved, tmp_path, format):
    source = open_source(saved(rounding(format), tiny_pixart))
    FORMAT.export(source, tmp_path / "out.safetensors", lambda done, total: None)
    state = load_file(tmp_path / "out.safetensors")
    for name in source.layers:
        layer = source.layer(name)
        theirs = kitchen_weight(state, name, layer.weight_shape)
        x = torch.randn(9, layer.weight_shape[1]) * torch.logspace(-2, 2, 9).unsqueeze(1)
        bias = None if layer.bias is None else layer.bias.float()
        if format == "int8_tensorwise":
            y = torch.nn.functional.linear(x, theirs, bias)
        else:
            rounded = QuantizedTensor.from_float(x, STORED[format][0].__name__)
            y = torch.nn.functional.linear(rounded.dequantize(), theirs.dequantize(), bias)
        assert torch.allclose(y, layer(x), rtol=1e-4, atol=1e-4)


def test_kitchen_rounds_inputs_of_svdquant_as_dmquant_does():
    x, ones = torch.randn(9, 128).bfloat16(), torch.ones(128, dtype=torch.bfloat16)
    codes, scales, _ = quantize_svdquant_w4a4(x, ones, torch.zeros(128, 1, dtype=torch.bfloat16))
    theirs = _unpack_int4_row_major(codes[:9]).float() * scales[:, :9].float().T.repeat_interleave(64, 1)
    assert torch.equal(theirs.bfloat16(), fake_quantize(x, LAYOUTS["svdquant_w4a4"].inputs[0]))


@pytest.mark.parametrize("format", BEYOND)
def test_kitchen_multiplies_rotated_and_low_rank_layers_as_dmquant_does(saved, tmp_path, format):
    recipe = Recipe.load("rtn").with_settings(**{"activations": "none"} | BEYOND[format])
    source = open_source(saved(recipe, WIDE))
    FORMAT.export(source, tmp_path / "out.safetensors", lambda done, total: None)
    state = load_file(tmp_path / "out.safetensors")
    for name in source.layers:
        layer = source.layer(name)
        theirs = kitchen_weight(state, name, layer.weight_shape)
        x = torch.randn(9, layer.weight_shape[1])
        bias = None if layer.bias is None else layer.bias.float()
        if format == "svdquant_w4a4":
            y = torch.nn.functional.linear(x.bfloat16(), theirs, None if bias is None else bias.bfloat16()).float()
            assert (y - layer(x)).norm() < 0.05 * y.norm()  # both scales and quotients are bfloat16 there
            continue
        assert torch.equal(theirs.dequantize(), layer.float_weight())
        assert torch.allclose(torch.nn.functional.linear(x, theirs.dequantize(), bias), layer(x), atol=1e-5)
