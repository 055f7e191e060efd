"""diffusers' own `bfl` quantizer on what is written for it: weights bit for bit, images by from_single_file."""

import pytest
import torch
from diffusers import BFLQuantizationConfig, DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.bfl.utils import BFLFP8RLinear, BFLNVFP4Linear, dequantize_fp8r, dequantize_nvfp4
from safetensors.torch import load_file
from torch import nn

from dmquant import quantize_pipeline
from dmquant.exchange.formats import writable
from dmquant.kernels import forced
from dmquant.pipelines.models.opening import open_source
from dmquant.recipe import Recipe
from tests.tiny import PIXART_CALL, tiny_pixart, tiny_sd

ROWS = {"weights": "fp8_e4m3", "granularity": "channel", "store": "fp32"}
CALIBRATION = {"calibration": {"prompts": 3, "steps_per_prompt": 1}, "learning": {"batch_size": 1}}
PROMPTS = ["apple", "cat", "boat"]


def loaded(folder):
    """A PixArt backbone by diffusers' quantizer: its class has no from_single_file, which would do the same."""
    quantizer = DiffusersAutoQuantizer.from_config(BFLQuantizationConfig(torch.float32))
    state = quantizer.maybe_update_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    with torch.device("meta"):
        model = PixArtTransformer2DModel.from_config(PixArtTransformer2DModel.load_config(folder))
    quantizer.preprocess_model(model, device_map=None, state_dict=state)
    load_model_dict_into_meta(model, state, torch.float32, hf_quantizer=quantizer, device_map={"": "cpu"})
    return model


def decoded(layer):
    if isinstance(layer, BFLNVFP4Linear):
        return dequantize_nvfp4(layer.weight, layer.weight_scale, layer.weight_scale_2)
    return dequantize_fp8r(layer.weight, layer.weight_scale)


def test_both_kinds_of_its_layers_decode_to_our_weights(tmp_path):
    """NVFP4 with calibrated input_scale, and FP8 with a scale a row, in one file."""
    rules = [{"match": "*ff*", **ROWS, "activations": "none", "activation_scale": "online"}]
    blocks = {"weights": "nvfp4", "activations": "nvfp4", "activation_scale": "static:1"}
    recipe = Recipe(name="both", rules=rules, **blocks, **CALIBRATION)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, **PIXART_CALL}
    quantize_pipeline(tiny_pixart(width=64), recipe, calibration=PROMPTS, out=tmp_path / "ours", **call)
    source = open_source(tmp_path / "ours")
    told = writable("bfl").export(source, tmp_path / "theirs", lambda done, total: None)
    assert "no from_single_file" in told.notes[0]
    model = loaded(tmp_path / "theirs" / "transformer")
    kinds = set()
    for name in source.layers:
        layer = model.get_submodule(name)
        kinds.add(type(layer))
        assert torch.equal(decoded(layer), source.layer(name).dequantize(torch.float32))
    assert kinds == {BFLNVFP4Linear, BFLFP8RLinear}


def test_images_of_diffusers_are_ours(tmp_path):
    """In float32, by the lines of the model card."""
    pipeline = tiny_sd()
    convolutions = [name for name, layer in pipeline.unet.named_modules() if isinstance(layer, nn.Conv2d)]
    recipe = Recipe(name="rows", rules=[{"match": convolutions, "keep": True}], **ROWS)
    quantize_pipeline(pipeline, recipe, out=tmp_path / "ours")
    writable("bfl").export(open_source(tmp_path / "ours"), tmp_path / "theirs", lambda done, total: None)
    unet = UNet2DConditionModel.from_single_file(
        str(tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors"),
        config=str(tmp_path / "theirs"),
        subfolder="unet",
        quantization_config=BFLQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert any(isinstance(layer, BFLFP8RLinear) for layer in unet.modules())
    theirs = image(DiffusionPipeline.from_pretrained(tmp_path / "theirs", unet=unet))
    with forced("reference"):
        assert torch.equal(theirs, image(DiffusionPipeline.from_pretrained(tmp_path / "ours")))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("cat", num_inference_steps=2, generator=seed, output_type="pt", height=32, width=32).images
