"""Activation quantization: online, scales come from the token itself, whatever the batch around it; static, from
calibration, by the timestep of each row."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dmquant.activations import ActivationSpec, TimestepRanges, fake_quantize, ranges_of, static_scale
from dmquant.cpu import lookup
from dmquant.cpu.compiling import missing_to_compile
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.kernels import reference


@pytest.mark.parametrize("format", ["fp6", "fp8", "fp6_e3m2", "int8", "int6"])
def test_each_token_is_rounded_on_its_own_absmax_scale(format):
    x, fmt = torch.randn(2, 5, 48), get_format(format)
    scale = x.abs().amax(-1, keepdim=True) / fmt.max
    assert torch.equal(fake_quantize(x, ActivationSpec.parse(format)), fmt.round(x / scale) * scale)


def test_a_token_does_not_see_its_neighbours():
    x = torch.randn(4, 6, 32)
    louder = x.clone()
    louder[1:] *= 1000
    spec = ActivationSpec.parse("fp6")
    assert torch.equal(fake_quantize(x, spec)[0], fake_quantize(louder, spec)[0])


@pytest.mark.parametrize("split", [None, 20])
@pytest.mark.parametrize("name", ["mxfp6", "nvfp4", "fp6", "fp6 image"])
@pytest.mark.parametrize(("shape", "dim"), [((4, 6, 32), -1), ((4, 32), -1), ((4, 32, 3, 3), -3)])
def test_a_row_of_the_batch_does_not_see_the_others(name, shape, dim, split):
    x, spec = torch.randn(shape), ActivationSpec.parse(*name.split(), split=split)
    louder = x.clone()
    louder[1:] *= 37
    assert torch.equal(fake_quantize(x, spec, dim)[0], fake_quantize(louder, spec, dim)[0])
    assert torch.equal(fake_quantize(x, spec, dim)[2:3], fake_quantize(x[2:3], spec, dim))


@pytest.mark.parametrize(("shape", "dim"), [((32,), -1), ((32, 3, 3), -3)])
@pytest.mark.parametrize("name", ["nvfp4", "fp6", "int8 image"])
def test_inputs_without_a_batch_are_one_row(name, shape, dim):
    x, spec = torch.randn(shape), ActivationSpec.parse(*name.split())
    alone = fake_quantize(x.unsqueeze(0), spec, dim).squeeze(0)
    assert torch.equal(fake_quantize(x, spec, dim), alone)


@pytest.mark.parametrize(("shape", "dim"), [((2, 6, 32), -1), ((2, 32, 3, 3), -3)])
def test_a_static_base_leaves_the_scales_of_blocks_to_the_input(shape, dim):
    x, spec = torch.randn(shape), ActivationSpec.parse("nvfp4", scale="static:2", split=20)
    base = torch.tensor([0.01, 3.0]).view(2, *[1] * (len(shape) - 1))
    e4m3, e2m1 = get_format("fp8"), get_format("fp4")
    blocks = x.movedim(dim, -1).unflatten(-1, (2, 16))
    of_rows = base.view(2, *[1] * (blocks.ndim - 1))
    ratio = (blocks.abs().amax(-1, keepdim=True) / 6 / of_rows).clamp(min=e4m3.min_positive)
    scale = of_rows * e4m3.round(ratio)
    expected = (e2m1.round(blocks / scale) * scale).flatten(-2).movedim(-1, dim)
    assert torch.equal(fake_quantize(x, spec, dim, base), expected)
    assert spec.scale_shape(32) == (2, 1)
    assert spec.split is None


def test_a_convolution_scales_each_pixel_over_its_channels():
    x = torch.randn(2, 16, 4, 5)
    spec = ActivationSpec.parse("fp6")
    as_tokens = fake_quantize(x.permute(0, 2, 3, 1), spec).permute(0, 3, 1, 2)
    assert torch.equal(fake_quantize(x, spec, dim=-3), as_tokens)


@pytest.mark.parametrize("format", ["int8", "fp6"])
@pytest.mark.parametrize(("shape", "dim"), [((3, 5, 16), -1), ((3, 16, 4, 5), -3), ((3, 16), -1)])
def test_one_scale_an_image_is_one_for_all_of_each_row(format, shape, dim):
    x, spec = torch.randn(shape) * torch.tensor([1.0, 30.0, 0.0]).view(-1, *(1,) * (len(shape) - 1)), get_format(format)
    rows = fake_quantize(x, ActivationSpec.parse(format, "image"), dim)
    for row, exact in zip(rows, x, strict=True):
        scale = (exact.abs().amax() / spec.max).clamp(min=2.0**-126)
        assert torch.equal(row, spec.round(exact / scale) * scale)
        assert torch.equal(row, fake_quantize(exact, ActivationSpec.parse(format, "tensor"), dim))


def test_finer_granularity_loses_less_where_channels_differ():
    x = torch.randn(64, 128) * torch.logspace(-2, 2, 128)
    errors = [
        (fake_quantize(x, ActivationSpec.parse("int6", granularity)) - x).square().mean(0) / x.square().mean(0)
        for granularity in ("tensor", "token", "group:16")
    ]
    assert errors[0].mean() > errors[1].mean() > errors[2].mean()


def test_the_remainder_of_a_token_gets_a_group_of_its_own():
    x = torch.randn(3, 40)
    y = fake_quantize(x, ActivationSpec.parse("fp8", "group:32"))
    assert torch.equal(y[:, 32:], fake_quantize(x[:, 32:], ActivationSpec.parse("fp8")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_tokens_stay_zero_and_nan_stays_nan(dtype):
    x = torch.randn(4, 8, dtype=dtype)
    x[1] = 0
    x[2, 3] = float("nan")
    y = fake_quantize(x, ActivationSpec.parse("fp6"))
    assert y.dtype == dtype
    assert torch.equal(y[1], torch.zeros(8, dtype=dtype))
    assert y[2, 3].isnan()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "nvfp4"])
def test_block_formats_work_on_activations(name):
    x = torch.randn(16, 64)
    error = (fake_quantize(x, ActivationSpec.parse(name)) - x).square().mean() / x.square().mean()
    assert error < {"mxfp4": 0.025, "nvfp4": 0.015, "mxfp6": 0.0015, "mxfp8": 0.0015}[name]


def test_channel_scales_are_refused_for_activations():
    with pytest.raises(UsageError, match="use token"):
        ActivationSpec.parse("fp6", "channel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "granularity", "split"),
    [
        ("fp6", "token", None),
        ("int6", "token", None),
        ("mxfp6", "token", None),
        ("nvfp4", "token", None),
        ("fp6", "token", 500),
        ("int8", "image", None),
        ("nvfp4 mse image", "token", None),
    ],
)
def test_the_compiled_loop_gives_the_reference_bit_for_bit(format, granularity, split, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(lookup, "PAYS_AFTER", 0)
    if missing_to_compile():
        pytest.skip("no C++ compiler: large activations run eagerly")
    format, *more = format.split()
    spec = ActivationSpec.parse(format, granularity, "fp32", "online", split, *more)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 256, 1152, dtype=dtype)
        assert x.numel() >= lookup.WORTH_COMPILING
        assert torch.equal(lookup.fake_quantize(x, spec, -1), reference.fake_quantize(x, spec, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["fp6", "fp8", "int8"])
def test_one_static_scale_from_the_true_absmax_is_the_online_tensor_scale(format, dtype):
    x = torch.randn(3, 7, 40).to(dtype)
    spec = ActivationSpec.parse(format, "tensor", scale="static:1")
    scale = (x.abs().amax().float() / spec.fmt.max).view(1, 1)
    online = fake_quantize(x, ActivationSpec.parse(format, "tensor"))
    assert torch.equal(fake_quantize(x, spec, scale=static_scale(scale, None, x, -1)), online)


@pytest.mark.parametrize(("shape", "dim"), [((4, 5, 12), -1), ((4, 12, 3, 5), -3), ((12, 3, 5), -3)])
def test_static_channel_scales_are_what_numpy_makes_of_them(shape, dim):
    spec = ActivationSpec.parse("fp6", "channel", scale="static:1")
    x = torch.randn(shape) * torch.logspace(-1, 1, 12).view(
        [12 if axis == dim else 1 for axis in range(-len(shape), 0)]
    )
    scale = torch.rand(1, 12) + 0.1  # clips some
    channels_last = np.moveaxis(x.numpy(), dim, -1)
    values = spec.fmt.values.numpy()
    nearest = np.abs(channels_last[..., None] / scale[0].numpy()[:, None] - values).argmin(-1)
    expected = np.moveaxis(values[nearest] * scale[0].numpy(), -1, dim)
    got = fake_quantize(x, spec, dim, static_scale(scale, None, x, dim))
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 48, 1000])
def test_every_timestep_lies_in_the_range_that_exact_arithmetic_says(count):
    exact = [min(int(Fraction(timestep * count, 1000)), count - 1) for timestep in range(1001)]
    for dtype in (torch.int64, torch.float32):
        assert ranges_of(torch.arange(1001, dtype=dtype), count).tolist() == exact


def test_timesteps_outside_the_schedule_take_the_nearest_range():
    assert ranges_of(torch.tensor([-5.0, 1000.0, 4000.0, float("inf")]), 10).tolist() == [0, 9, 9, 9]


def test_each_row_of_a_mixed_batch_gets_the_scale_of_its_timestep():
    scale, ranges = torch.tensor([[0.1], [0.2], [0.4], [0.8]]), TimestepRanges({4})
    ranges.set(torch.tensor([999, 0, 260]))
    chosen = static_scale(scale, ranges, torch.zeros(3, 5, 8), -1)
    assert torch.equal(chosen.flatten(), torch.tensor([0.8, 0.1, 0.2]))
    tokens_of_rows = static_scale(scale, ranges, torch.zeros(6, 8), -1)
    assert torch.equal(tokens_of_rows.flatten(), torch.tensor([0.8, 0.8, 0.1, 0.1, 0.2, 0.2]))
    for one_for_all in (700, 700.0, torch.tensor(700)):
        ranges.set(one_for_all)
        assert static_scale(scale, ranges, torch.zeros(3, 5, 8), -1).flatten().tolist() == pytest.approx([0.4])


def test_rows_that_do_not_fit_and_timesteps_nobody_told_are_clear_errors():
    scale, ranges = torch.ones(2, 1), TimestepRanges({2})
    for unset in (None, ranges):
        with pytest.raises(RuntimeError, match="was not told the timestep"):
            static_scale(scale, unset, torch.zeros(2, 8), -1)
    ranges.set(torch.tensor([1, 999]))
    for x in (torch.zeros(3, 8), torch.zeros(8)):
        with pytest.raises(RuntimeError, match="does not divide into the 2 rows"):
            static_scale(scale, ranges, x, -1)


@pytest.mark.parametrize(
    ("format", "granularity", "scale", "message"),
    [
        ("fp6", "token", "static:4", "cannot be one per token"),
        ("fp6", "group:32", "static:1", "cannot be one per group:32"),
        ("mxfp6", "tensor", "static:1", "cannot be one per group:32"),
        ("fp6", "tensor", "static", "use online, or static:R"),
        ("fp6", "tensor", "static:0", "use online, or static:R"),
        ("fp6", "tensor", "onlin", "did you mean 'online'"),
    ],
)
def test_scales_that_make_no_sense_are_refused(format, granularity, scale, message):
    with pytest.raises(UsageError, match=message):
        ActivationSpec.parse(format, granularity, scale=scale)
