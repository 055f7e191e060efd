"""Tensors that look alike are read in every way there is, and the way that fits a model's weights is named."""

import itertools
import re

import pytest
import torch
from torch import nn

from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.applying import places
from dmquant.exchange.checking import check
from dmquant.exchange.dialects import Reading
from dmquant.gpu.blocked import to_blocked
from dmquant.pipelines.models.opening import find
from dmquant.qtensor import quantize_tensor
from tests.exchange import labelled

OTHER = ("high first", "swizzled", "divided")
DIALECTS = [Reading(*way) for way in itertools.product(*zip(labelled.OWN, OTHER, strict=True))]


def backbone(seed=0, width=64, heavy=True):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(width, 128), nn.Linear(128, 256), nn.Linear(256, width))
    for layer in layers:  # rows of unlike sizes, as in trained models: scales are then unlike too
        layer.weight.data *= torch.logspace(-1, 1, len(layer.weight)).view(-1, 1) if heavy else 1
    return layers.requires_grad_(False)


def opened(path, layers, way):
    return labelled.read(find(labelled.write(path, layers, ["0", "1", "2"], way=way)))


@pytest.mark.parametrize("way", DIALECTS, ids=str)
def test_one_reading_of_every_dialect_gives_what_was_written(tmp_path, way):
    layers = backbone()
    found = opened(tmp_path / "file.safetensors", layers, way).found
    for name, layer in layers.named_children():
        exact = quantize_tensor(layer.weight, "nvfp4").dequantize()
        given = labelled.all_readings(found, name, tuple(layer.weight.shape))
        # A reciprocal is rounded once more.
        tolerance = 2e-7 if way.globals == "divided" else 0
        assert torch.allclose(given[way], exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("way", [way for way in DIALECTS if way != labelled.OWN], ids=str)
def test_a_wrong_dialect_is_named(tmp_path, way):
    layers = backbone()
    foreign = opened(tmp_path / "file.safetensors", layers, way)
    with pytest.raises(UserError, match=f"is mislabelled: .*, but with {re.escape(str(way))} they are"):
        check(foreign, places(foreign, layers, "it"), layers, "it")


def test_the_right_dialect_passes_and_other_weights_are_told(tmp_path):
    layers = backbone()
    foreign = opened(tmp_path / "file.safetensors", layers, labelled.OWN)
    check(foreign, places(foreign, layers, "it"), layers, "it")
    other = backbone(seed=1)
    with pytest.raises(UserError, match=r"does not hold the weights of it: .* is (1\.9|2)"):
        check(foreign, places(foreign, other, "it"), other, "it")


def test_other_shapes_and_names_are_another_base_model(tmp_path):
    foreign = opened(tmp_path / "file.safetensors", backbone(), labelled.OWN)
    with pytest.raises(UserError, match="is of another base model than it: 0 is 128x64, not 128x128"):
        places(foreign, backbone(width=128), "it")
    with pytest.raises(UserError, match="holds 0, 1, 2, which it lacks"):
        places(foreign, nn.ModuleDict({"a": nn.Linear(64, 128)}), "it")


def test_mxfp8_is_read_in_both_orders_of_its_scales(tmp_path):
    weight = torch.randn(128, 256) * torch.logspace(-1, 1, 128).view(-1, 1)
    q = quantize_tensor(weight, "mxfp8")
    stored = to_blocked(q.scales.stored.view(torch.uint8)).view(128, 8)
    entries = {"a.weight": q.codes.view(torch.float8_e4m3fn), "a.weight_scale": stored}
    path = tmp_path / "file.safetensors"
    tensor_file.write(path, [tensor_file.stored(*entry) for entry in entries.items()], {})
    given = labelled.all_readings(find(path), "a", (128, 256))
    assert [way.scales for way in given if torch.equal(given[way], q.dequantize())] == ["swizzled"]
    assert len(given) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_one_scale_is_read_both_ways(tmp_path, dtype):
    codes = torch.randn(32, 48).mul(20).to(dtype)
    path = tmp_path / "file.safetensors"
    entries = {"a.weight": codes, "a.weight_scale": torch.rand(32, 1) + 0.5}
    tensor_file.write(path, [tensor_file.stored(*entry) for entry in entries.items()], {})
    given = labelled.all_readings(find(path), "a", (32, 48))
    scale = entries["a.weight_scale"]
    assert torch.equal(given[Reading(None, None, "multiplied")], codes.float() * scale)
    assert torch.allclose(given[Reading(None, None, "divided")], codes.float() / scale)
