"""Online activation quantization: scales come from the token itself, whatever the batch around it."""

import pytest
import torch

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.kernels import cpu, reference


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


def test_a_convolution_scales_each_pixel_over_its_channels():
    x = torch.randn(2, 16, 4, 5)
    spec = ActivationSpec.parse("fp6")
    as_tokens = fake_quantize(x.permute(0, 2, 3, 1), spec).permute(0, 3, 1, 2)
    assert torch.equal(fake_quantize(x, spec, dim=-3), as_tokens)


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
@pytest.mark.parametrize(("format", "granularity"), [("fp6", "token"), ("int6", "token"), ("mxfp6", "token")])
def test_the_compiled_loop_gives_the_reference_bit_for_bit(format, granularity, monkeypatch):
    monkeypatch.setattr(cpu, "PAYS_AFTER", 0)
    if not cpu.can_compile():
        pytest.skip("no C++ compiler: large activations run eagerly")
    spec = ActivationSpec.parse(format, granularity)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 1152, dtype=dtype)
        assert x.numel() >= cpu.WORTH_COMPILING
        assert torch.equal(cpu.fake_quantize(x, spec, -1), reference.fake_quantize(x, spec, -1))
