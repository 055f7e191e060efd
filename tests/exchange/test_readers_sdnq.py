"""SDNQ's tensors as its own dequantizer has them, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sdnq", reason="installed apart from what the other tests need, see .ci/run")

from sdnq.quantizer import sdnq_quantize_layer_weight

from dmquant.errors import UserError
from dmquant.pipelines.models.opening import open_foreign

INTEGERS = ["int8", "uint8", *(f"{kind}{bits}" for bits in range(2, 8) for kind in ("int", "uint"))]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float5_e2m2fn", "float6_e3m2fn", "float7_e3m3fn"]
NAME = "blocks.0.proj"


def saved(folder, tensors, **settings):
    """A component's folder with one layer of these tensors."""
    state = {f"{NAME}.{part}": one.contiguous() for part, one in tensors.items() if one is not None}
    save_file(state | {"norm.weight": torch.ones(3), f"{NAME}.bias": torch.ones(64)}, folder / "a.safetensors")
    config = {"quantization_config": {"quant_method": "sdnq", **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantized(dtype, columns=96, **settings):
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)) * 0.1
    return sdnq_quantize_layer_weight(weight, layer_class_name="Linear", weights_dtype=dtype, **settings)


def expected(dequantizer, tensors, dtype=torch.float32):
    given = {"skip_quantized_matmul": dequantizer.use_quantized_matmul, "skip_compile": True, "dtype": dtype}
    return dequantizer(**tensors, **given).float()


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("group", [-1, 0, 32])
def test_every_dtype_and_group_is_decoded_alike(tmp_path, dtype, group):
    dequantizer, tensors = quantized(dtype, group_size=group)
    opened = open_foreign(saved(tmp_path, tensors, weights_dtype=dtype, group_size=group))
    layer = opened.layers[NAME]
    assert (opened.format.name, layer.format, layer.shape) == ("sdnq", dtype, (64, 96))
    assert torch.equal(layer.weight(), expected(dequantizer, tensors))
    assert set(opened.rest) == {"norm.weight", f"{NAME}.bias"}


@pytest.mark.parametrize("dtype", ["int8", "uint4", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_svd": True, "svd_rank": 8},
        {"use_hadamard": True, "hadamard_group_size": 16},
        {"use_hadamard": True, "hadamard_group_size": 256},
        {"use_quantized_matmul": True},
        {"use_quantized_matmul": True, "use_svd": True, "svd_rank": 8},
        {"group_size": -2},
        {"use_svd": True, "svd_rank": 8, "use_hadamard": True},
    ],
    ids=str,
)
def test_branches_rotations_and_transposed_weights_are_decoded_alike(tmp_path, dtype, settings):
    if (dtype, settings) == ("uint4", {"group_size": -2}):
        return  # refused, see below
    dequantizer, tensors = quantized(dtype, **settings)
    layer = open_foreign(saved(tmp_path, tensors, weights_dtype=dtype, **settings)).layers[NAME]
    assert torch.equal(layer.weight(), expected(dequantizer, tensors))


def test_scales_in_half_the_bits_are_multiplied_in_these(tmp_path):
    dequantizer, tensors = quantized("int8", dequantize_fp32=False, torch_dtype=torch.bfloat16)
    assert tensors["scale"].dtype == torch.bfloat16
    opened = open_foreign(saved(tmp_path, tensors, weights_dtype="int8", dequantize_fp32=False))
    assert torch.equal(opened.layers[NAME].weight(), expected(dequantizer, tensors, torch.bfloat16))


@pytest.mark.parametrize(
    "settings",
    [
        {"weights_dtype": "int8", "modules_dtype_dict": {"int5": ["other"], "uint4": [f"{NAME}.weight"]}},
        {"weights_dtype": "int8", "modules_dtype_dict": {"uint4": ["blocks.*.proj*"]}},
        {"weights_dtype": "uint2", "modules_dtype_dict": {"minimum_4bit": ["proj"]}},
        {"weights_dtype": "int8", "modules_quant_config": {".blocks": {"weights_dtype": "uint4"}}},
    ],
    ids=str,
)
def test_a_layers_own_dtype_is_found_as_sdnq_finds_it(tmp_path, settings):
    dequantizer, tensors = quantized("uint4")
    layer = open_foreign(saved(tmp_path, tensors, **settings)).layers[NAME]
    assert layer.format == "uint4"
    assert torch.equal(layer.weight(), expected(dequantizer, tensors))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weights_dtype": "uint4", "scale_dtype": "float8_e4m3fn"}, "has scale_dtype, which is not read"),
        ({"weights_dtype": "uint4", "use_codebook": True}, "has use_codebook, which is not read"),
        ({"weights_dtype": "int9"}, "is in int9, which is not read"),
        ({"weights_dtype": "float7_e3m4fnu"}, "is in float7_e3m4fnu, which is not read"),
        ({"weights_dtype": "int4"}, "in int4 has a zero point"),
        ({"weights_dtype": "uint8"}, "no Linear in uint8"),
        ({"weights_dtype": "uint7"}, "no Linear in uint7"),
    ],
)
def test_what_is_not_read_is_one_line(tmp_path, settings, reason):
    _, tensors = quantized("uint4")
    with pytest.raises(UserError, match=reason):
        open_foreign(saved(tmp_path, tensors, **settings))


@pytest.mark.parametrize(("part", "reason"), [("weight", "a scale and no weight"), ("svd_up", "half a branch")])
def test_a_layer_that_lacks_a_tensor_is_refused(tmp_path, part, reason):
    _, tensors = quantized("int8", use_svd=True, svd_rank=8)
    with pytest.raises(UserError, match=reason):
        open_foreign(saved(tmp_path, tensors | {part: None}, weights_dtype="int8"))


def test_packed_weights_of_one_scale_are_refused_as_nothing_tells_their_rows(tmp_path):
    _, tensors = quantized("uint4", group_size=-2)
    with pytest.raises(UserError, match="no Linear in uint4 with scales of rows or groups"):
        open_foreign(saved(tmp_path, tensors, weights_dtype="uint4"))


def test_a_branch_of_other_shapes_is_refused(tmp_path):
    _, tensors = quantized("int8", use_svd=True, svd_rank=8)
    with pytest.raises(UserError, match=r"of shape \[64, 96\] has a branch of \[64, 8\] and \[8, 95\]"):
        open_foreign(saved(tmp_path, tensors | {"svd_down": tensors["svd_down"][:, :-1]}, weights_dtype="int8"))


def test_convolutions_are_refused(tmp_path):
    _, tensors = sdnq_quantize_layer_weight(torch.randn(64, 32, 3, 3), layer_class_name="Conv2d", weights_dtype="uint4")
    with pytest.raises(UserError, match=r"no Linear in uint4 .*others are not read here"):
        open_foreign(saved(tmp_path, tensors, weights_dtype="uint4"))
