"""A saved model read a layer at a time, and what is no saved model."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from dmquant.errors import UserError
from dmquant.layers import QuantLinear
from dmquant.pipelines.models.opening import find, open_foreign, open_source
from dmquant.recipe import Recipe
from tests.tiny import tiny_pixart, tiny_sd

LOWRANK = Recipe.load("rtn").with_settings(
    transforms=[{"method": "lowrank", "rank": 4}], granularity="group:16", store="e4m3"
)


@pytest.mark.parametrize(("build", "recipe"), [(tiny_pixart, LOWRANK), (tiny_sd, Recipe.load("rtn"))])
def test_layers_and_tensors_are_those_of_the_loaded_model(saved, build, recipe):
    source = open_source(saved(recipe, build))
    loaded = getattr(DiffusionPipeline.from_pretrained(source.folder), source.component)
    expected = {name: layer for name, layer in loaded.named_modules() if hasattr(layer, "qweight")}
    assert source.layers.keys() == expected.keys()
    for name, layer in expected.items():
        read = source.layer(name)
        assert type(read) is type(layer)
        assert torch.equal(read.float_weight(), layer.float_weight())
        assert read.bias is None if layer.bias is None else torch.equal(read.bias.float(), layer.bias)
        assert source.layers[name].qweight.is_meta  # nothing stays
    state = loaded.state_dict()
    assert set(source.rest) == {name for name in state if name.rpartition(".")[0] not in expected}
    for name in source.rest:
        assert torch.equal(source.tensor(name).float(), state[name])
    assert source.config["_class_name"] == type(loaded).__name__
    with pytest.raises(UserError, match="lacks the tensor 'none'"):
        source.tensor("none")


def test_a_model_in_full_precision_is_not_exported(tmp_path):
    tiny_pixart(tmp_path / "tiny")
    with pytest.raises(UserError, match="is in full precision: export takes what dmquant quantized"):
        open_source(tmp_path / "tiny")


def test_a_truncated_model_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved(Recipe.load("rtn")), tmp_path / "model")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_source(folder)
    with pytest.raises(UserError, match="truncated or damaged"):
        find(weights)


def test_a_file_in_no_known_format_is_refused(tmp_path):
    tiny_pixart(tmp_path / "tiny")
    with pytest.raises(UserError, match="is in full precision: give what is quantized"):
        open_foreign(tmp_path / "tiny" / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({"a.qweight": torch.zeros(3, dtype=torch.int16)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"in no format that is known here: 1 tensors of \["):
        open_foreign(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no safetensors files"):
        find(tmp_path / "tiny" / "scheduler")


def test_a_folder_is_found_by_its_backbone(saved):
    found = find(saved(Recipe.load("rtn")))
    assert found.path.name == "transformer"
    assert found.config["_class_name"] == "PixArtTransformer2DModel"
    name = next(name for name in found.tensors if name.endswith("attn1.to_q.qweight"))
    assert found.tensor(name).shape == found.tensors[name].shape
    assert isinstance(open_source(saved(Recipe.load("rtn"))).layer(name.removesuffix(".qweight")), QuantLinear)
