"""Tensors that look alike are read in every way there is, and the way that fits a model's weights is named."""

import copy
import itertools
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dmquant
from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.applying import apply_, places
from dmquant.exchange.checking import check
from dmquant.exchange.dialects import Reading
from dmquant.exchange.formats import formats
from dmquant.gpu.blocked import to_blocked
from dmquant.pipelines.models.opening import find, open_foreign, open_source
from dmquant.pipelines.models.saving import save_whole
from dmquant.qtensor import quantize_tensor
from tests.exchange import labelled
from tests.tiny import TINY, tiny_pixart

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


NVFP4 = {"name": "x", "weights": "nvfp4", "granularity": "group:16", "activations": "none"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny models in full precision and in NVFP4: one whose original names are not known, one whose are."""
    made = {}
    for name, build in (("pixart", lambda: tiny_pixart(width=128)), ("sd3", TINY["sd3"].build)):
        folder, pipeline = tmp_path_factory.mktemp(name), build()
        plain = copy.deepcopy(pipeline.transformer)
        dmquant.quantize_(pipeline.transformer, dmquant.Recipe.from_dict(NVFP4 | {"engine": "comfyui"}, "a test"))
        save_whole(pipeline, folder / "model", "", ["transformer"])
        made[name] = plain, open_source(folder / "model")
    return made


def _turned(path, by):
    """Rewrite a file with the tensors that `by` changes by name."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: by(name, tensor) for name, tensor in tensors.items()}, path)


def _other_nibbles(name, tensor):
    packed = tensor.dtype == torch.uint8 and tensor.ndim == 2
    return (tensor << 4) | (tensor >> 4) if packed else tensor


def _swizzled(name, tensor):
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    return to_blocked(tensor.view(torch.uint8))[: tensor.numel()].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_comfyui_files_go_into_the_backbone_whole(sources, tmp_path, name):
    """Fused queries, keys and values and swapped halves come apart as they were."""
    plain, source = sources[name]
    path = tmp_path / "file.safetensors"
    formats()["comfyui"].export(source, path, lambda *told: None)
    foreign, backbone = open_foreign(path), copy.deepcopy(plain).requires_grad_(False)
    found = places(foreign, backbone, "it")
    check(foreign, found, backbone, "it")
    apply_(foreign, found, backbone, "it", lambda *told: None)
    state = backbone.state_dict()
    assert {module for place in found for module in place.modules} == source.layers.keys()
    for module in source.layers:
        assert torch.equal(state[f"{module}.weight"], source.layer(module).float_weight())
    assert all(torch.equal(state[name], source.tensor(name)) for name in source.rest)


def test_comfyui_files_of_the_other_nibble_order_are_named(sources, tmp_path):
    """ModelOpt's export with ComfyUI's metadata and swizzle leaves the nibbles as they are."""
    plain, source = sources["pixart"]
    path = tmp_path / "file.safetensors"
    formats()["comfyui"].export(source, path, lambda *told: None)
    _turned(path, _other_nibbles)
    foreign = open_foreign(path)
    line = r"is mislabelled: read as comfyui .*, but with nibbles low first, block scales (swizzled|linear), scales mul"
    with pytest.raises(UserError, match=line):
        check(foreign, places(foreign, plain, "it"), plain, "it")


def test_modelopt_folders_in_comfyuis_dialect_are_named(sources, tmp_path):
    plain, source = sources["pixart"]
    formats()["modelopt"].export(source, tmp_path / "out", lambda *told: None)
    (path,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    _turned(path, lambda name, tensor: _swizzled(name, _other_nibbles(name, tensor)))
    foreign = open_foreign(tmp_path / "out")
    with pytest.raises(UserError, match=r"but with nibbles high first, .*, which is the dialect of ComfyUI and"):
        check(foreign, places(foreign, plain, "it"), plain, "it")
