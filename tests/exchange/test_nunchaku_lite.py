"""Nunchaku's order of elements, which this file has another way; layers as diffusers declares them."""

import importlib.util
import json
import sys
import types

import diffusers.quantizers
import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.errors import UserError
from dmquant.exchange.formats import formats
from dmquant.exchange.formats.nunchaku_lite import exporting, packing, reading
from dmquant.layers import quantize_layer
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import create
from tests.tiny import tiny_pixart, tiny_sd

KEEP = {"rules": [{"match": "*", "keep": True}, {"match": "transformer_blocks.*", "keep": False}], "keep": "none"}
LOWRANK = {"method": "lowrank", "rank": 12, "iterations": 1}
RECIPES = {
    "int4": Recipe(
        name="int4", weights="int4", granularity="group:64", store="bf16", activations="int4",
        activation_granularity="group:64", transforms=[LOWRANK], **KEEP,
    ),
    "nvfp4": Recipe(name="nvfp4", weights="nvfp4", activations="nvfp4", **KEEP),
}  # fmt: skip
INPUTS = {
    "int4": ActivationSpec.parse("int4", "group:64", engine="nunchaku-lite"),
    "nvfp4": ActivationSpec.parse("nvfp4", engine="nunchaku-lite"),
}
PRECISIONS = {one.name: one for one in exporting.PRECISIONS}
SIDES = [(128, 128), (256, 384), (384, 128)]


def wide(**options):
    return tiny_pixart(width=128, **options)


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """Each recipe's source, folder, and what the export says."""
    made = {}
    for name, recipe in RECIPES.items():
        source, out = open_source(saved(recipe, wide)), tmp_path_factory.mktemp("nunchaku") / name
        made[name] = source, out, formats()["nunchaku-lite"].export(source, out, lambda done, total: None)
    return made


@pytest.mark.parametrize(("rows", "columns"), SIDES)
def test_codes_lie_where_the_lanes_of_a_warp_take_them(rows, columns):
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    lane, tile = n % 8 * 4 + k % 32 // 8, n // 128 * (columns // 64) + k // 64
    register = n % 16 // 8 * 2 + k % 64 // 32
    place = (((tile * 8 + n % 128 // 16) * 32 + lane) * 4 + register) * 8 + k % 8
    expected = torch.empty(rows * columns, dtype=torch.uint8)
    expected[place.flatten()] = codes.flatten()
    packed = packing.pack_codes(codes)
    octets = packed.view(torch.uint8).flatten()
    assert packed.shape == (rows, columns // 2)
    assert torch.equal(torch.stack([octets & 15, octets >> 4], 1).flatten(), expected)
    assert torch.equal(packing.unpack_codes(packed), codes)


@pytest.mark.parametrize(("rows", "columns"), SIDES)
def test_scales_lie_where_the_lanes_of_a_warp_take_them(rows, columns):
    generator = torch.Generator().manual_seed(0)
    groups = columns // 64
    n, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    wide_place = (n // 128 * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
    wide_scales = torch.randn(rows, groups, generator=generator).bfloat16()
    groups = columns // 16
    n, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    lane = n % 8 * 4 + n % 32 // 8
    small_place = (((n // 128 * (groups // 4) + g // 4) * 32 + lane) * 4 + n % 128 // 32) * 4 + g % 4
    small = torch.rand(rows, groups, generator=generator).to(torch.float8_e4m3fn)
    for scales, place in ((wide_scales, wide_place), (small, small_place)):
        plain = scales if scales.dtype.itemsize == 2 else scales.view(torch.uint8)
        expected = torch.empty_like(plain.flatten())
        expected[place.flatten()] = plain.flatten()
        packed = packing.pack_scales(scales)
        assert packed.shape == scales.shape[::-1]
        assert torch.equal(packed.view(plain.dtype).flatten(), expected)
        assert torch.equal(packing.unpack_scales(packed).view(plain.dtype), plain)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 4), tiles=st.integers(1, 3))
def test_branches_and_vectors_come_back(rank, tiles):
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(16 * rank, 128 * tiles, generator=generator).bfloat16()
    assert torch.equal(packing.unpack_down(packing.pack_down(down)), down)
    assert torch.equal(packing.unpack_up(packing.pack_up(down.T.contiguous())), down.T)
    assert torch.equal(packing.unpack_vector(packing.pack_vector(down[0])), down[0])
    r, k = torch.meshgrid(torch.arange(16 * rank), torch.arange(128 * tiles), indexing="ij")
    register, lane = (r % 16 // 8 * 2 + k % 16 // 8) * 2 + k % 2, r % 8 * 4 + k % 8 // 2
    place = (k // 16 * rank + r // 16) * 256 + lane * 8 + register
    expected = torch.empty(down.numel(), dtype=down.dtype)
    expected[place.flatten()] = down.flatten()
    assert torch.equal(packing.pack_down(down).flatten(), expected)


@settings(max_examples=200, deadline=None)
@given(base=st.floats(1e-20, 1e20))
def test_two_numbers_of_eight_bits_are_a_scale_to_three_in_ten_thousand(base):
    base = torch.tensor([[base]])
    first, second = exporting.two_factors(base)
    assert first.dtype == second.dtype == torch.bfloat16
    assert abs(first.double() * second.double() / base.double() - 1) < 3.1e-4


def test_a_scale_that_two_numbers_make_is_exact():
    for first in (1.0, 1.5, 0.0078125 * 129):
        base = torch.tensor([[first * 1.25 * 2.0**-9]])
        assert torch.equal(torch.stack(exporting.two_factors(base)).double().prod(), base.double().squeeze())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_read_back_is_what_was_written(exported, name):
    source, out, result = exported[name]
    assert result.formats[name] == len(source.layers)
    assert not result.exact  # a branch, or a base in two factors
    opened = open_foreign(out)
    assert opened.format.name == "nunchaku-lite"
    assert opened.layers.keys() == source.layers.keys()
    assert set(opened.rest) == set(source.rest)
    for layer, ours in source.layers.items():
        decoded = reading.decoded(opened.found, layer, PRECISIONS[name])
        expected, whole = source.layer(layer).dequantize(torch.float32), source.layer(layer).float_weight()
        assert (opened.layers[layer].weight() - whole).norm() < 1e-3 * whole.norm()
        assert opened.layers[layer].shape == ours.weight_shape
        if name == "int4":
            assert torch.equal(decoded, expected)
        else:
            assert torch.allclose(decoded, expected, rtol=3.1e-4, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_layers_compute_what_dmquants_do(exported, name):
    source, out, _ = exported[name]
    opened = open_foreign(out)
    x = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(0))
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"):
        ours = source.layer(layer)
        built = opened.layers[layer].build(torch.nn.Linear(*ours.weight_shape[::-1]))
        *given, rounded = ours.inputs(x)
        expected = F.linear(fake_quantize(rounded, INPUTS[name]), ours.dequantize(torch.float32), ours.bias)
        expected = ours.complete_output(expected, given)
        assert torch.allclose(built(x), expected, atol=2**-8 * float(expected.abs().max()))


def test_smoothing_divides_and_the_branch_takes_the_input_as_it_is():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(128, 128)
    transforms = create([("smooth", {"fold": False}), ("lowrank", {"rank": 12, "iterations": 1})], layer, None)
    spec = WeightSpec.parse("int4", "group:64")
    quantized = quantize_layer(layer, spec, ActivationSpec.parse("int4", "group:64"), transforms=transforms)
    factor = torch.rand(1, 128, generator=generator).add(0.5).bfloat16()
    quantized.load_parts({"smooth": {"factor": factor}})
    x = torch.randn(5, 128, generator=generator)
    down, up = exporting._down(quantized, 16), exporting._up(quantized, 16)
    branch = quantized.parts(quantized.transforms[-1])
    ours = F.linear(F.linear(x * factor.float(), branch["down"].float()), branch["up"].float())
    assert torch.allclose(F.linear(F.linear(x, down.float()), up.float()), ours, atol=0.02 * float(ours.abs().max()))
    assert torch.allclose(x / exporting._divisor(quantized).float(), x * factor.float(), rtol=2**-8)


def test_diffusers_builds_modules_that_take_exactly_these_tensors(exported, monkeypatch):
    """Its module imports a package of kernels from the Hub, of which declaring modules takes nothing."""
    utilities = declared(monkeypatch)
    for name, (source, out, _) in exported.items():
        config = json.loads((out / source.component / "config.json").read_text())["quantization_config"]
        checked = diffusers.quantizers.quantization_config.NunchakuLiteQuantizationConfig(**config)
        model = PixArtTransformer2DModel.from_config(source.folder / source.component)
        replaced = utilities.replace_with_nunchaku_linear(model, checked.to_dict(), torch.bfloat16)
        assert replaced == len(source.layers)
        state = load_file(out / source.component / "diffusion_pytorch_model.safetensors")
        assert state.keys() == model.state_dict().keys()
        for layer in source.layers:
            for part, parameter in model.get_submodule(layer).named_parameters():
                stored = state[f"{layer}.{part}"]
                assert (stored.shape, stored.dtype) == (parameter.shape, parameter.dtype), (name, layer, part)


def declared(monkeypatch):
    """diffusers.quantizers.nunchaku.utils beside a package `kernels` without any."""
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *given, **named: types.SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    place = importlib.util.find_spec("diffusers.quantizers.nunchaku").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("diffusers.quantizers.nunchaku.utils", f"{place}/utils.py")
    module = importlib.util.module_from_spec(spec)
    for name, value in (("is_kernels_available", True), ("is_kernels_version", True)):
        monkeypatch.setattr(f"diffusers.utils.{name}", lambda *given, value=value: value)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("recipe", "build", "reason"),
    [
        (Recipe(name="narrow", weights="nvfp4"), tiny_pixart, "has 32 inputs, no multiple of 128"),
        (Recipe(name="other", weights="int4", granularity="group:32", **KEEP), wide, "INT4 in groups of 64"),
        (Recipe(name="conv", weights="nvfp4"), tiny_sd, "linear layers alone|no multiple of 128"),
        (RECIPES["nvfp4"].with_settings(transforms=["rotate"]), wide, "has the transform rotate"),
    ],
)
def test_what_it_cannot_take_is_refused_and_nothing_is_left(saved, tmp_path, recipe, build, reason):
    with pytest.raises(UserError, match=rf"^nunchaku-lite cannot take [\w.]+: it .*({reason}).*--for nunchaku-lite$"):
        formats()["nunchaku-lite"].export(open_source(saved(recipe, build)), tmp_path / "out", lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("wscales", lambda one: one.float(), r"wscales' is F32 .*not BF16"),
        ("proj_up", None, r"proj_up' is missing"),
        ("qweight", lambda one: one[:64].clone(), r"128 to 64 and rank 16 is no multiple"),
        ("smooth_factor", lambda one: one[:5].clone(), r"smooth_factor' is BF16 \[5\], not BF16 \[128\]"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(exported, tmp_path, part, change, reason):
    source, out, _ = exported["int4"]
    state = load_file(out / source.component / "diffusion_pytorch_model.safetensors")
    name = f"transformer_blocks.0.attn1.to_q.{part}"
    tensor = state.pop(name)
    if change is not None:
        state[name] = change(tensor)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((out / source.component / "config.json").read_text())
    with pytest.raises(UserError, match=reason):
        open_foreign(tmp_path)
