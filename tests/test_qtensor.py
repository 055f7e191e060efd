"""Scales and quantized tensors: what is stored is what runs, at the claimed size, for every format and granularity."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.cpu import expanding, lookup
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.kernels import reference
from dmquant.qtensor import WeightSpec, from_matrix, quantize, quantize_tensor, to_matrix
from dmquant.scaling import BLOCK_FORMATS, STORES, Granularity, fit_absmax, fit_mse, to_groups

FORMATS = (
    "fp4",
    "fp4_e1m2",
    "fp4_e3m0",
    "fp6",
    "fp6_e3m2",
    "fp8",
    "fp8_e5m2",
    "fp3_e1m1",
    "int2",
    "int4",
    "int8",
    "lut4",
    "nl4",
)
GRANULARITIES = ("tensor", "channel", "group:16", "group:100")


def weights(rows=24, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("format", "granularity", "store"), itertools.product(FORMATS, GRANULARITIES, STORES))
def test_every_value_is_a_format_value_times_its_stored_scale(format, granularity, store):
    w = weights()
    q = quantize_tensor(w, format, granularity, store=store)
    fmt, kind = get_format(format), Granularity.parse(granularity)
    groups = to_groups(q.dequantize(), kind)
    multiples = groups / q.scale.unsqueeze(-1)
    nearest = fmt.decode(fmt.encode(multiples))
    assert torch.allclose(multiples, nearest, rtol=1e-5, atol=1e-6)
    assert torch.equal(q.dequantize(), quantize_tensor(w.clone(), format, granularity, store=store).dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_nearest_codes_leave_at_most_half_a_step(format):
    w = weights()
    q = quantize_tensor(w, format, "group:32", store="fp32")
    scaled = to_groups(w, Granularity.parse("group:32")) / q.scale.unsqueeze(-1)
    error = (to_groups(q.dequantize(), Granularity.parse("group:32")) / q.scale.unsqueeze(-1) - scaled).abs()
    assert (error <= get_format(format).step(scaled) / 2 + 1e-5).all()


@pytest.mark.parametrize(
    ("format", "granularity", "store", "bits"),
    [
        ("fp4", "group:64", "bf16", 4.25),
        ("fp6", "group:64", "bf16", 6.25),
        ("int3", "group:64", "bf16", 3.25),
        ("fp4", "group:32", "e8m0", 4.25),
        ("fp4", "group:128", "fp32", 4.25),
        ("mxfp4", "ignored", "ignored", 4.25),
        ("mxfp6", "ignored", "ignored", 6.25),
        ("mxfp8", "ignored", "ignored", 8.25),
    ],
)
def test_packed_size_is_what_is_claimed(format, granularity, store, bits):
    w = weights(32, 384)
    assert quantize_tensor(w, format, granularity, store=store).nbytes * 8 == bits * w.numel()


def test_nvfp4_adds_one_float_to_four_and_a_half_bits():
    w = weights(32, 384)
    assert quantize_tensor(w, "nvfp4").nbytes == w.numel() * 4.5 / 8 + 4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("store", STORES)
def test_the_mse_rule_never_loses_to_absmax(format, store):
    groups, fmt = to_groups(weights(), Granularity.parse("group:48")), get_format(format)

    def error(scales):
        scale = scales.decode().unsqueeze(-1)
        of_groups = (fmt.round(groups / scale) * scale - groups).square().sum(-1)
        return of_groups.sum(-1) if STORES[store].factors else of_groups  # groups give way to each other there

    assert (error(fit_mse(groups, fmt, store)) <= error(fit_absmax(groups, fmt, store)) + 1e-9).all()


def test_the_mse_rule_clips_where_that_pays():
    w = weights(64, 64)
    errors = [
        (quantize_tensor(w, "int3", "channel", rule).dequantize() - w).square().mean() for rule in ("absmax", "mse")
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1.0, 1e30, 3.4e38])
def test_degenerate_groups_stay_finite(store, magnitude):
    w = torch.zeros(4, 128)
    w[1] = magnitude
    w[2, ::2] = -magnitude
    w[3] = 1.0
    back = quantize_tensor(w, "fp4", "group:32", "absmax", store).dequantize()
    assert torch.isfinite(back).all()
    assert torch.equal(back[0], torch.zeros(128))
    if magnitude == 1.0:
        assert torch.allclose(back, w, rtol=0.35)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    w = weights()
    w[3, 4] = value
    with pytest.raises(UsageError, match="NaN or infinity"):
        quantize_tensor(w, "fp4")


def test_the_remainder_of_a_row_gets_a_group_of_its_own():
    w = weights(8, 100)
    w[:, 96:] *= 100
    q = quantize_tensor(w, "fp8", "group:32")
    assert q.scale.shape == (8, 4)
    assert (q.dequantize() - w).abs().max() < 0.07 * w.abs().max()
    assert (q.dequantize()[:, :96] - w[:, :96]).abs().max() < 0.3  # not scaled by its loud neighbours


@pytest.mark.parametrize(("kernel", "channels", "size"), [((3, 3), 32, 16), ((3, 3), 10, 16), ((2, 1), 7, 64)])
def test_a_convolution_is_grouped_along_its_input_channels_as_numpy_does_it(kernel, channels, size):
    w = np.random.default_rng(0).standard_normal((6, channels, *kernel), np.float32)
    rows = np.ascontiguousarray(w.transpose(0, 2, 3, 1)).reshape(6, -1)
    expected = np.empty_like(rows)
    for start in range(0, rows.shape[1], size):
        group = rows[:, start : start + size]
        scale = np.abs(group).max(1, keepdims=True) / np.float32(127)
        expected[:, start : start + size] = np.rint(group / scale) * scale
    q = quantize_tensor(torch.from_numpy(w), "int8", f"group:{size}", store="fp32")
    assert np.array_equal(q.dequantize().numpy(), expected.reshape(6, *kernel, channels).transpose(0, 3, 1, 2))


def test_a_group_that_divides_the_channels_lies_within_one_position_of_the_kernel():
    w = torch.randn(4, 32, 3, 3)
    scale = quantize_tensor(w, "fp4", "group:16", store="fp32").scale.view(4, 3, 3, 2)
    for row, y, x, half in itertools.product(range(4), range(3), range(3), range(2)):
        assert scale[row, y, x, half] == w[row, 16 * half : 16 * half + 16, y, x].abs().max() / 6


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(), rows=st.integers(1, 4), channels=st.integers(2, 9), kernel=st.lists(st.integers(1, 3), max_size=2)
)
def test_the_matrix_form_is_channels_last_half_by_half_and_can_be_undone(data, rows, channels, kernel):
    split = data.draw(st.none() | st.integers(1, channels - 1))
    w = torch.randn(rows, channels, *kernel)
    cut = channels if split is None else split
    halves = [np.moveaxis(half, 1, -1).reshape(rows, -1) for half in (w[:, :cut].numpy(), w[:, cut:].numpy())]
    matrix = to_matrix(w, split)
    assert np.array_equal(matrix.numpy(), np.concatenate(halves, 1))
    assert torch.equal(from_matrix(matrix, w.shape, split), w)


@pytest.mark.parametrize("split", [None, 24])
def test_dequantized_convolutions_are_in_the_memory_format_that_kernels_read(split):
    for kernel in (lookup, reference):
        for format in ("fp4", "int3"):
            q = quantize(torch.randn(8, 64, 3, 3), WeightSpec.parse(format, "group:8", split=split))
            weight = kernel.dequantize(q.codes, q.scale, q.spec, q.shape, torch.bfloat16)
            assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_without_input_channels_is_refused():
    with pytest.raises(UsageError, match=r"this tensor has the shape \(5,\)"):
        quantize_tensor(torch.randn(5), "fp4")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_mx_scales_follow_the_ocp_floor_rule(name):
    w = weights(16, 64) * torch.logspace(-6, 6, 16).unsqueeze(1)
    q = quantize_tensor(w, name)
    fmt = get_format(BLOCK_FORMATS[name].format)
    largest = to_groups(w, Granularity.parse("group:32")).abs().amax(-1).double()
    expected = torch.floor(torch.log2(largest)) - torch.floor(torch.log2(torch.tensor(fmt.max)))
    assert torch.equal(q.scale.double(), 2.0**expected)


def test_pow2_scales_are_octaves_of_a_channel_scale_and_clip_nothing():
    w = weights(8, 256) * torch.tensor([1.0, 0.1, 0.01, 1e-9]).repeat_interleave(64)
    q = quantize_tensor(w, "fp4", "group:64", store="pow2")
    octaves = torch.log2(q.scale / q.scales.base)
    assert torch.equal(octaves, octaves.round())
    assert (octaves >= -14).all()
    assert (to_groups(w, Granularity.parse("group:64")).abs().amax(-1) <= 6 * q.scale * (1 + 1e-6)).all()


def test_nvfp4_scales_are_e4m3_multiples_of_one_float():
    w = weights(16, 64)
    w[0] = 0  # an empty group must not set the tensor's scale
    q = quantize_tensor(w / 100, "nvfp4")
    e4m3 = get_format("fp8_e4m3")
    multiples = q.scale / q.scales.base
    assert torch.allclose(multiples, e4m3.round(multiples), rtol=1e-6)
    assert 400 < multiples.max() < 448.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("format", FORMATS)
def test_tables_and_compiled_code_give_the_reference_bit_for_bit(format, store, dtype):
    for columns, granularity in itertools.product((256, 250, 37), ("group:64", "channel", "tensor")):
        q = quantize_tensor(weights(6, columns), format, granularity, store=store)
        arguments = (q.codes, q.scale, q.spec, q.shape, dtype)
        expected = reference.dequantize(*arguments)
        assert torch.equal(lookup.dequantize(*arguments), expected)
        assert torch.equal(expanding.dequantize(*arguments), expected)
        assert torch.equal(expanding.scales_of(q.scales), q.scale)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 130),
    format=st.sampled_from(FORMATS),
    size=st.integers(1, 140),
    store=st.sampled_from(list(STORES)),
    exponent=st.integers(-30, 30),
)
def test_any_shape_and_group_size_round_trips(rows, columns, format, size, store, exponent):
    w = weights(rows, columns) * 2.0**exponent
    q = quantize_tensor(w, format, f"group:{size}", store=store)
    back = q.dequantize()
    assert back.shape == w.shape
    assert torch.isfinite(back).all()
    assert (back.abs() <= 2.5 * w.abs().max()).all()


@pytest.mark.parametrize("granularity", ["group:0", "group:x", "row", "channel:3", "token"])
def test_unknown_granularities_are_usage_errors(granularity):
    with pytest.raises(UsageError, match="granularity"):
        WeightSpec.parse("fp4", granularity)


def test_unknown_rules_and_stores_suggest_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'absmax'"):
        WeightSpec.parse("fp4", scale="absmaxx")
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        WeightSpec.parse("fp4", store="bf61")
