"""What four bits an activation need: block scales by the error that they leave, and means that are not quantized."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.activations import FEWEST, ActivationSpec, fake_quantize
from dmquant.cpu import lookup
from dmquant.errors import UsageError
from dmquant.gpu import decode
from dmquant.recipe import Recipe

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def spec_of(rule="absmax", center="none", format="nvfp4", **more):
    return ActivationSpec.parse(format, rule=rule, center=center, **more)


def lost(x, spec):
    """Squared errors of groups."""
    return (fake_quantize(x, spec) - x).double().square().unflatten(-1, (-1, spec.granularity.size)).sum(-1)


def by_hand(x, divisors):
    """NVFP4 in float64 and NumPy, one block of a row after another, the divisor of least error for each."""
    base = np.float32(np.abs(x).max() / np.float32(6) / np.float32(448))
    rounded = np.empty_like(x, dtype=np.float64)
    for at in np.ndindex(x.shape[0], x.shape[1] // 16):
        block = x[at[0], at[1] * 16 : at[1] * 16 + 16].astype(np.float64)
        tried = []
        for divisor in divisors:
            wanted = torch.tensor(np.abs(block).max() / divisor / base).float().clamp(2**-9, 448)
            scale = float(wanted.to(torch.float8_e4m3fn).float()) * float(base)
            nearest = E2M1[np.abs(np.abs(block / scale)[:, None] - E2M1).argmin(1)] * np.sign(block) * scale
            tried.append((((nearest - block) ** 2).sum(), nearest))
        rounded[at[0], at[1] * 16 : at[1] * 16 + 16] = min(tried, key=lambda one: one[0])[1]
    return rounded


@pytest.mark.parametrize(("rule", "divisors"), [("absmax", [6]), ("four-over-six", [6, 4])])
def test_four_over_six_is_what_numpy_makes_of_it(rule, divisors):
    x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(fake_quantize(x, spec_of(rule))[0], by_hand(x[0].numpy(), divisors), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([0.0, 1.0, 6.0]), st.sampled_from(["nvfp4", "mxfp4"]))
def test_no_group_loses_more_by_a_rule_that_tries_more(seed, spread, format):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 64, generator=generator) * torch.exp2(spread * torch.randn(2, 6, 64, generator=generator))
    absmax, two, many = (lost(x, spec_of(rule, format=format)) for rule in ("absmax", "four-over-six", "mse"))
    assert (two <= absmax).all()
    assert (many <= absmax).all()
    assert format == "mxfp4" or (many <= two).all()


def test_on_normal_inputs_four_over_six_takes_a_seventh_of_the_error_and_mse_a_quarter():
    x = torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(0))
    absmax, two, many = (lost(x, spec_of(rule)).sum() for rule in ("absmax", "four-over-six", "mse"))
    assert 0.8 < two / absmax < 0.86
    assert 0.72 < many / absmax < 0.78


@pytest.mark.parametrize(("shape", "dim"), [((3, FEWEST, 32), -1), ((3, 32, 4, 5), 1)])
def test_an_image_that_is_one_color_stays_as_it_is(shape, dim):
    x = torch.randn(shape[0], 32)
    x = x.view(3, 1, 32).expand(shape) if dim == -1 else x.view(3, 32, 1, 1).expand(shape)
    assert torch.allclose(fake_quantize(x, spec_of(center="image"), dim), x, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(fake_quantize(x, spec_of(), dim), x, rtol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([1.0, 10.0, 1e3]))
def test_what_a_mean_adds_costs_nothing(seed, size):
    generator = torch.Generator().manual_seed(seed)
    differences = torch.randn(2, 9, 48, generator=generator)
    differences -= differences.mean(1, keepdim=True)
    mean = size * torch.randn(2, 1, 48, generator=generator)
    centered = lost(mean + differences, spec_of(center="image")).sum()
    assert centered <= 1.02 * lost(differences, spec_of()).sum() + 1e-4
    assert size < 10 or centered < 0.2 * lost(mean + differences, spec_of()).sum()


@pytest.mark.parametrize("split", [None, 16])
@pytest.mark.parametrize(("shape", "dim"), [((4, 9, 48), -1), ((4, 48, 3, 3), -3)])
def test_a_row_is_centered_by_itself(shape, dim, split):
    x, spec = torch.randn(shape), spec_of("mse", "image", split=split)
    louder = x.clone()
    louder[1:] *= 37
    assert torch.equal(fake_quantize(x, spec, dim)[0], fake_quantize(louder, spec, dim)[0])
    if dim == -3:
        assert torch.allclose(fake_quantize(x[2], spec, dim), fake_quantize(x, spec, dim)[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 48), (5, FEWEST - 1, 48), (48,), (0, 9, 48)])
def test_of_few_tokens_no_mean_is_taken_out(shape):
    x = torch.randn(shape)
    assert torch.equal(fake_quantize(x, spec_of(center="image")), fake_quantize(x, spec_of()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "center"), [("mse", "none"), ("four-over-six", "none"), ("absmax", "image")])
def test_kernels_round_as_the_reference(rule, center, dtype):
    x = torch.randn(2, 9, 64).to(dtype)
    for spec in (spec_of(rule, center), spec_of(rule, center, split=32), spec_of(rule, center, "fp6")):
        for kernel in (lookup, decode):
            found = kernel.fake_quantize(x, spec, -1)
            assert found.dtype == dtype
            assert torch.equal(found, fake_quantize(x, spec))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_rule": "mes"}, "unknown activation rule 'mes': did you mean 'mse'"),
        ({"activation_center": "imag"}, "unknown center of activations 'imag': did you mean 'image'"),
    ],
)
def test_a_recipe_says_which_words_there_are(settings, message):
    with pytest.raises(UsageError, match=message):
        Recipe.from_dict({"name": "x", **settings}, "x.yaml")


@pytest.mark.parametrize("more", [{"rule": "mse"}, {"center": "image"}])
def test_static_scales_have_neither(more):
    with pytest.raises(UsageError, match="are for online scales"):
        ActivationSpec.parse("fp6", "tensor", scale="static:1", **more)
