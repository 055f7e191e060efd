"""ComfyUI's files: what is written is read back bit for bit, and what is no such file is refused in a line."""

import pytest
import torch

from dmquant.convert import plan
from dmquant.exchange.formats.comfyui import FORMAT
from dmquant.exchange.keys import Target, original
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.recipe import Recipe
from tests.tiny import TINY, tiny_pixart, tiny_sd

FORMATS = {
    "nvfp4": {"weights": "nvfp4"},
    "mxfp8": {"weights": "mxfp8"},
    "float8_e4m3fn": {"weights": "fp8", "granularity": "tensor", "store": "fp32"},
    "float8_e5m2": {"weights": "fp8_e5m2", "granularity": "tensor", "store": "fp32"},
    "int8_tensorwise": {"weights": "int8", "granularity": "channel", "store": "fp32"},
}
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
    recipe = Recipe.load("rtn").with_settings(rules=rules, activations="none", **FORMATS["mxfp8"])
    refused = [each.name for each in plan(backbone, recipe) if FORMAT.refuses(layers[each.name], each.weights, None)]
    return recipe.with_settings(rules=[*recipe.rules, {"match": [*refused, WIDTH], "keep": True}])


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
