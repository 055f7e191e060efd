"""ModelOpt on what is written in its layouts: its own export of the same model side by side, and its decoding.

It asks for packages that nothing else here needs: `.ci/run` installs it apart.
"""

import json

import pytest
import torch
from safetensors import safe_open

APART = "installed apart from what the other tests need, see .ci/run"
pytest.importorskip("modelopt", reason=APART)
pytest.importorskip("omegaconf", reason=APART)

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from dmquant import quantize_pipeline
from dmquant.exchange.formats import writable
from dmquant.host import weight_file
from dmquant.pipelines.models.opening import open_source
from dmquant.recipe import Recipe
from tests.tiny import PIXART_CALL, TOKENS, tiny_pixart

ROWS = {"weights": "fp8_e4m3", "activations": "fp8_e4m3", "granularity": "channel", "store": "fp32"}
WHOLE = {"weights": "fp8_e4m3", "granularity": "tensor", "store": "fp32", "scale": "hessian"}
STATIC = {"activation_scale": "static:1"}
CALIBRATION = {"calibration": {"prompts": 3, "steps_per_prompt": 1}, "learning": {"batch_size": 1}}
ALIKE = {
    "NVFP4_DEFAULT_CFG": {"weights": "nvfp4", "activations": "nvfp4", **STATIC, **CALIBRATION},
    "W4A16_NVFP4_CFG": {"weights": "nvfp4"},
    "FP8_DEFAULT_CFG": {
        **WHOLE,
        **STATIC,
        **CALIBRATION,
        "activations": "fp8_e4m3",
        "activation_granularity": "tensor",
    },
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ROWS,
    "MXFP8_DEFAULT_CFG": {"weights": "mxfp8", "activations": "mxfp8"},
    "INT8_WEIGHT_ONLY_CFG": {"weights": "int8", "granularity": "channel", "store": "fp32"},
}
"""Our settings that its configurations have."""


def run(model):
    hidden, text = torch.randn(2, 4, 16, 16), torch.randn(2, TOKENS, 32)
    conditions = {"resolution": None, "aspect_ratio": None}
    model(hidden, encoder_hidden_states=text, timestep=torch.tensor([500, 500]), added_cond_kwargs=conditions)


def header(folder):
    return {name: (one.dtype, one.shape) for name, one in weight_file.header(folder).items()}


@pytest.mark.parametrize("config", ALIKE)
def test_names_dtypes_shapes_and_configuration_are_those_of_its_own_export(tmp_path, config, capsys):
    model = tiny_pixart(width=64).transformer
    mtq.quantize(model, getattr(mtq, config), forward_loop=run)
    export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    theirs = header(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    quantized = {name.removesuffix(".weight_scale") for name in theirs if name.endswith(".weight_scale")}

    pipeline = tiny_pixart(width=64)
    kept = [
        name for name, one in pipeline.transformer.named_modules() if hasattr(one, "weight") and name not in quantized
    ]
    recipe = Recipe(name="alike", keep="none", rules=[{"match": kept, "keep": True}], **ALIKE[config])
    call = {"num_inference_steps": 2, "height": 32, "width": 32, **PIXART_CALL}
    data = {"calibration": ["apple", "cat", "boat"], **call} if recipe.calibrated else {}
    quantize_pipeline(pipeline, recipe, out=tmp_path / "model", **data)
    source = open_source(tmp_path / "model")
    assert source.layers.keys() == quantized
    writable("modelopt").export(source, tmp_path / "ours", lambda done, total: None)
    ours = header(tmp_path / "ours" / "transformer" / "diffusion_pytorch_model.safetensors")
    parts = {name for name in theirs if name.rpartition(".")[0] in quantized and not name.endswith(".bias")}
    assert {name: theirs[name] for name in parts} == {name: ours[name] for name in parts}
    assert ours.keys() == theirs.keys()

    told = [
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "theirs", tmp_path / "ours" / "transformer")
    ]
    their, our = (one["quantization_config"] for one in told)
    assert (our["quant_algo"], our["quant_method"]) == (their["quant_algo"], their["quant_method"])
    if "config_groups" in their:  # for the others it writes none
        assert our["config_groups"] == their["config_groups"]


def test_its_nvfp4_tensor_decodes_to_our_weights(saved, tmp_path):
    source = open_source(saved(Recipe(name="blocks", weights="nvfp4", scale="mse"), width=64))
    writable("modelopt").export(source, tmp_path / "out", lambda done, total: None)
    with safe_open(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name in source.layers:
            codes, scale, base = (
                file.get_tensor(f"{name}.{one}") for one in ("weight", "weight_scale", "weight_scale_2")
            )
            shape = (codes.shape[0], 2 * codes.shape[1])
            tensor = NVFP4QTensor(shape, torch.float32, codes)
            theirs = tensor.dequantize(torch.float32, scale=scale, double_scale=base, block_sizes={-1: 16})
            assert torch.equal(theirs, source.layer(name).dequantize(torch.float32))
