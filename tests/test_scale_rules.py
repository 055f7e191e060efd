"""Scale rules that search: by gradient, and over what a store can hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.qtensor import WeightSpec, quantize, quantize_tensor
from dmquant.recipe import Recipe
from dmquant.scaling import STORES, absmax, fit_absmax, fit_gradient, fit_mse

FORMATS = ["fp4", "fp4_e3m0", "fp6", "fp8", "int4"]


def groups_of(groups=40, size=64, seed=0):
    return torch.randn(groups, 1, size, generator=torch.Generator().manual_seed(seed))


def errors(groups, scale, fmt):
    """Squared, by group, with the nearest value of the format searched by numpy."""
    values, x = np.unique(fmt.values.double().numpy()), groups.double().numpy()
    scaled = x / scale.double().numpy()[..., None]
    nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, scaled)]
    return ((x - nearest * scale.double().numpy()[..., None]) ** 2).sum(-1)


def exhaustive(groups, fmt):
    """The least squared error of every group over 500 multiples of absmax."""
    tried = [errors(groups, absmax(groups) * float(m) / fmt.max, fmt) for m in np.linspace(0.2, 1.6, 500)]
    return np.min(tried, axis=0)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_finds_the_best_scale_of_a_channel(format):
    groups, fmt = groups_of(4, 4096), get_format(format)
    found = errors(groups, fit_gradient(groups, fmt, "fp32").decode(), fmt)
    assert found.sum() <= 1.05 * exhaustive(groups, fmt).sum()
    assert found.sum() < 0.99 * errors(groups, fit_absmax(groups, fmt, "fp32").decode(), fmt).sum()


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    store=st.sampled_from(list(STORES)),
    size=st.integers(1, 64),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 1000),
)
def test_the_gradient_never_loses_to_absmax(format, store, size, exponent, seed):
    groups, fmt = groups_of(6, size, seed) * 2.0**exponent, get_format(format)
    groups[0] = 0
    found, start = fit_gradient(groups, fmt, store), fit_absmax(groups, fmt, store)
    assert found.stored.dtype == start.stored.dtype
    lost = [fmt.round(groups / s.decode()[..., None]) * s.decode()[..., None] - groups for s in (found, start)]
    assert (lost[0].square().sum(-1) <= lost[1].square().sum(-1)).all()


@pytest.mark.parametrize("format", ["fp4", "fp6", "int4"])
def test_its_gradient_is_that_of_finite_differences(format):
    """2 sum (Q[x] - x) c, in float64, where no code changes."""
    fmt, x, scale, h = get_format(format), torch.randn(500, generator=torch.Generator().manual_seed(0)), 0.31, 1e-6
    codes = fmt.round(x / scale).double()
    formula = 2 * ((codes * scale - x.double()) * codes).sum().item()

    def error(s):
        return (codes * s - x.double()).square().sum().item()

    assert formula == pytest.approx((error(scale + h) - error(scale - h)) / (2 * h), rel=1e-6)


def test_it_is_a_rule_without_data():
    weight = groups_of(24, 96).squeeze(1)
    by_gradient, by_absmax = (quantize_tensor(weight, "fp4", "channel", rule) for rule in ("gradient", "absmax"))
    lost = [(one.dequantize() - weight).square().sum() for one in (by_gradient, by_absmax)]
    assert lost[0] < 0.97 * lost[1]
    assert not Recipe.load("rtn").with_settings(scale="gradient").calibrated


@pytest.mark.parametrize("block", ["mxfp4", "nvfp4"])
def test_scales_of_block_formats_by_weight_error_are_as_good_as_any_they_can_store(block):
    """Every code of the group's scale is tried; the base of nvfp4 is that of its largest weight."""
    spec = WeightSpec.parse(block)
    size = spec.granularity.size
    groups = groups_of(60, size) * torch.logspace(-1, 1, 60).view(-1, 1, 1)
    found = fit_mse(groups, spec.fmt, spec.store)
    codes = torch.arange(1, 127 if spec.store == "e4m3" else 255, dtype=torch.uint8)
    tried = []
    for code in codes:
        scale = STORES[spec.store].decode(torch.full_like(found.stored, int(code)), found.base)
        if (scale * spec.fmt.max / absmax(groups)).max() > 0.1 and (scale > 0).all():
            tried.append(errors(groups, scale, spec.fmt))
    assert errors(groups, found.decode(), spec.fmt).sum() <= 1.01 * np.min(tried, axis=0).sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "lean"}, "scale: lean is fitted to the errors of rounding: gptq"),
        ({"rules": [{"match": "x", "scale": "lean"}]}, "scale: lean is fitted to the errors of rounding: gptq"),
        ({"store": "table", "scale": "mse"}, "it goes with weights: lut4 and granularity: channel"),
        ({"store": "table", "weights": "lut4", "scale": "mse"}, "not lut4 and group:32"),
        (
            {"store": "table", "weights": "lut4", "granularity": "channel", "scale": "absmax"},
            "a table is fitted by scale: mse or lean, not absmax",
        ),
        (
            {"store": "table", "weights": "lut4", "granularity": "channel", "scale": "mse", "candidates": ["lut4"]},
            "a table is no format to choose",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_when_read(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.load("rtn").with_settings(**changes)
    assert "\n" not in str(caught.value)


def test_lean_scales_without_data_are_refused():
    with pytest.raises(UsageError, match="scale rule 'lean' needs calibration data"):
        quantize(torch.ones(4, 4), WeightSpec.parse("fp4", "channel", "lean"))
