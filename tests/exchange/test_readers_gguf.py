"""GGUF files through the package gguf and through diffusers' own loader, bit for bit where GGUF holds what we have."""

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="installed apart from what the other tests need, see .ci/run")

from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor

from dmquant.errors import UserError
from dmquant.exchange.formats import formats, writable
from dmquant.exchange.formats.gguf import blocks, exporting, header
from dmquant.exchange.source import Importance
from dmquant.packing import unpack
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.recipe import Recipe
from tests.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3

GROUPS = {"granularity": "group:32", "store": "bf16", "scale": "mse"}
CALIBRATED = {"int4": "q4_0", "iq4_nl": "iq4_nl", "int5": "q5_0", "int6": "q8_0", "int8": "q8_0"}
"""Formats and the types that hold their codes."""


def recipe(weights, **changed):
    return Recipe(name=weights, weights=weights, **{**GROUPS, **changed})


def exported(folder, path, kind="gguf", importance=None):
    source = open_source(folder)
    source.importance = importance
    return source, writable(kind).export(source, path, lambda done, total: None)


def values(tensor):
    """A tensor of gguf's reader as it decodes it, float32."""
    shape = [int(side) for side in reversed(tensor.shape)]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)


def test_types_are_as_gguf_has_them():
    for number, kind in header.KINDS.items():
        named = gguf.GGMLQuantizationType(number)
        assert (named.name, *gguf.GGML_QUANT_SIZES[named]) == (kind.name, kind.size, kind.nbytes)
    for kind in blocks.WRITTEN.values():
        assert header.KINDS[kind.number] == (kind.name, kind.size, kind.nbytes)
    assert gguf.quants.IQ4_NL.kvalues == blocks.IQ4_NL_LEVELS.table


@pytest.mark.parametrize("kind", blocks.WRITTEN.values(), ids=blocks.WRITTEN)
def test_weighed_errors_are_less_than_unweighed_ones_and_than_those_of_ggufs_own_quantization(kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * 0.02
    weight[0] = 0
    cost = torch.randn(512, generator=generator).exp()
    named = gguf.GGMLQuantizationType(kind.number)

    def error(data):
        decoded = torch.from_numpy(gguf.dequantize(data, named))
        assert not decoded[0].any()
        return float((cost * (decoded - weight).square()).sum() / (cost * weight.square()).sum())

    weighed, even = (error(blocks.quantize(weight, one, kind).numpy()) for one in (cost, torch.ones(512)))
    limits = {"Q4_0": 0.0062, "IQ4_NL": 0.0049, "Q4_K": 0.0044, "Q5_0": 0.0017, "Q5_K": 0.0011, "Q8_0": 3e-5}
    assert weighed < limits[kind.name]
    assert weighed < even * (0.98 if kind.name == "Q8_0" else 0.92)
    if kind.name in ("Q4_0", "Q5_0", "Q8_0"):
        assert even < error(gguf.quantize(weight.numpy(), named))


@pytest.mark.parametrize("weights", CALIBRATED)
def test_codes_that_a_type_holds_arrive_bit_for_bit(saved, tmp_path, weights):
    source, result = exported(saved(recipe(weights)), tmp_path / "a.gguf")
    kind = CALIBRATED[weights]
    assert result.exact
    assert result.formats[kind] == len(source.layers)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert read.keys() == {f"{name}.weight" for name in source.layers} | {
        f"{name}.bias" for name, layer in source.layers.items() if layer.bias is not None
    } | {*source.rest}
    opened = open_foreign(tmp_path / "a.gguf")
    for name in source.layers:
        ours = source.layer(name).dequantize(torch.float32)
        assert read[f"{name}.weight"].tensor_type.name.lower() == kind
        assert torch.equal(values(read[f"{name}.weight"]), ours)
        assert torch.equal(opened.layers[name].weight(), ours)
    for name in source.rest:
        assert torch.equal(values(read[name]), source.tensor(name).float())
        assert torch.equal(opened.found.tensor(name).float(), source.tensor(name).float())


def test_scales_of_either_sign_in_half_precision_are_the_types_own(saved, tmp_path):
    source, result = exported(saved(recipe("iq4_nl", store="fp16")), tmp_path / "a.gguf")
    assert result.exact
    opened, negative = open_foreign(tmp_path / "a.gguf"), 0
    for name in source.layers:
        assert torch.equal(opened.layers[name].weight(), source.layer(name).dequantize(torch.float32))
        negative += int((source.layer(name).scales.decode() < 0).sum())
    assert negative > 0


@pytest.mark.parametrize(("weights", "granularity"), [("fp6", "group:64"), ("fp4", "channel"), ("int4", "tensor")])
def test_q8_0_holds_floats_too_whose_scale_is_for_whole_blocks(saved, tmp_path, weights, granularity):
    folder = saved(recipe(weights, granularity=granularity))
    source, result = exported(folder, tmp_path / "a.gguf", "gguf:q8_0")
    assert result.exact
    opened = open_foreign(tmp_path / "a.gguf")
    for name in source.layers:
        assert torch.equal(opened.layers[name].weight(), source.layer(name).dequantize(torch.float32))


@pytest.mark.parametrize(("weights", "options"), [("nvfp4", {}), ("int4", {"store": "fp32"}), ("lut4", {})])
def test_other_grids_are_quantized_again_and_that_is_said(saved, tmp_path, weights, options):
    folder = saved(Recipe(name="other", weights=weights, **({**GROUPS, **options} if weights != "nvfp4" else {})))
    source, result = exported(folder, tmp_path / "a.gguf")
    assert not result.exact
    assert any("quantized again" in note and "no calibration data" in note for note in result.notes)
    opened = open_foreign(tmp_path / "a.gguf")
    for name, layer in opened.layers.items():
        ours = source.layer(name).float_weight()
        assert (layer.weight() - ours).norm() < 0.08 * ours.norm()


def test_inputs_that_matter_are_nearer(saved, tmp_path):
    folder = saved(Recipe(name="blocks", weights="nvfp4"))
    name, layer = next(iter(open_source(folder).layers.items()))
    cost = torch.full((layer.in_features,), 1e-4)
    cost[::4] = 1.0
    source, result = exported(folder, tmp_path / "a.gguf", "gguf:q4_0", Importance({name: cost}, 8))
    exported(folder, tmp_path / "b.gguf", "gguf:q4_0")
    ours = source.layer(name).float_weight()
    weighed, even = (
        (cost * (open_foreign(tmp_path / f"{file}.gguf").layers[name].weight() - ours).square()).sum() for file in "ab"
    )
    assert weighed < 0.8 * even
    assert any("weighed by calibration data" in note for note in result.notes)
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["dmquant.importance"]
    assert bytes(field.parts[-1]).decode() == "mean squares of the inputs of 8 calls"


@pytest.mark.parametrize(
    ("build", "kind", "architecture"),
    [
        (tiny_sd, UNet2DConditionModel, "sd1"),
        (tiny_sd3, SD3Transformer2DModel, "sd3"),
    ],
)
def test_diffusers_loads_the_original_names(saved, tmp_path, build, kind, architecture):
    folder = saved(recipe("int4"), build)
    source, _ = exported(folder, tmp_path / "a.gguf")
    assert open_foreign(tmp_path / "a.gguf").found.metadata["general.architecture"] == architecture
    loaded = kind.from_single_file(
        tmp_path / "a.gguf",
        config=str(folder),
        subfolder=source.component,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    linear = {name for name, layer in source.layers.items() if layer.__class__.__name__ == "QuantLinear"}
    quantized = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, GGUFLinear)}
    assert linear <= quantized.keys()
    for name in source.layers:
        found = loaded.get_submodule(name).weight
        decoded = dequantize_gguf_tensor(found).float() if name in quantized else found.float()
        assert torch.equal(decoded, layer_of(source, name))
    for name in source.rest:
        assert torch.equal(state_of(loaded, name), source.tensor(name).float()), name


def test_layers_that_fluxs_original_names_fuse_are_rows_of_one(saved, tmp_path):
    """diffusers' converter knows one width of Flux alone, 3072."""
    source, result = exported(saved(recipe("int4"), tiny_flux), tmp_path / "a.gguf")
    assert result.exact
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    parts = [f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    fused = torch.cat([layer_of(source, name) for name in parts])
    assert torch.equal(values(read["single_blocks.1.linear1.weight"]), fused)
    swapped = torch.cat(source.tensor("norm_out.linear.weight").chunk(2)[::-1])
    assert torch.equal(values(read["final_layer.adaLN_modulation.1.weight"]), swapped.float())


def layer_of(source, name):
    return source.layer(name).dequantize(torch.float32)


def state_of(model, name):
    module, _, parameter = name.rpartition(".")
    found = getattr(model.get_submodule(module), parameter)
    return dequantize_gguf_tensor(found).float() if hasattr(found, "quant_type") else found.float()


def test_what_is_of_the_widths_of_k_quants_goes_there(saved, tmp_path):
    maker = exporting._Maker(open_source(saved(Recipe(name="blocks", weights="nvfp4"))), None)
    name = next(iter(maker.source.layers))
    for columns, kind in ((512, "Q4_K"), (96, "IQ4_NL"), (40, None)):
        maker.source.layers[name].in_features = columns
        chosen = maker.choose(name)
        assert (chosen and chosen.name) == kind


@pytest.mark.parametrize(
    ("weights", "kind", "again"),
    [("int4", "gguf", False), ("int4", "gguf:q8_0", False), ("int4", "gguf:iq4_nl", True), ("nvfp4", "gguf", True)],
)
def test_calibration_data_is_asked_for_where_layers_are_quantized_again(saved, weights, kind, again):
    made = recipe(weights) if weights == "int4" else Recipe(name=weights, weights=weights)
    assert writable(kind).weighs_errors(open_source(saved(made))) == again


def test_a_name_that_no_reader_keeps_is_refused_and_nothing_is_left(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LONGEST", 20)
    with pytest.raises(UserError, match="has more than the 20 characters"):
        exported(saved(recipe("int4")), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(saved, tmp_path):
    source = open_source(saved(recipe("int4"), tiny_pixart))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formats()["gguf"].export(source, tmp_path / "a.gguf", stop)
    assert list(tmp_path.iterdir()) == []


def test_nibbles_are_in_ggufs_order():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16)
    assert unpack(blocks.Q4_0.pack(codes), 4, 32).view(16, 2).T.flatten().tolist() == [*range(16), *range(16)]
