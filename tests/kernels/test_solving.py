"""The compiled parts of calibration, against the eager code and against what they have to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant import activations
from dmquant.activations import ActivationSpec
from dmquant.calib.layers.lean import fit_weighted
from dmquant.calib.layers.moments import fit_grid
from dmquant.convert import LayerPlan
from dmquant.cpu import lookup, solving
from dmquant.cpu.compiling import missing_compiler
from dmquant.formats import get_format
from dmquant.qtensor import WeightSpec
from dmquant.rounding import gptq
from dmquant.scaling import to_groups
from dmquant.stores import STORES

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="needs a C++ compiler")
FORMATS = ["fp4", "fp4_e3m0", "fp6", "fp8", "int3", "int4", "int8"]


@pytest.fixture
def uncompiled(monkeypatch):
    """A function of no arguments after which nothing is compiled."""
    return lambda: monkeypatch.setattr(solving, "library", lambda name: None)


def problem(rows=70, columns=150):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, columns, generator=generator).cumsum(1) * 0.3 + torch.randn(600, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize(("granularity", "store"), [("group:16", "e3m4"), ("channel", "bf16"), ("tensor", "fp32")])
@pytest.mark.parametrize("format", FORMATS)
def test_gptq_and_its_descent_are_those_of_the_eager_code(format, granularity, store, uncompiled):
    """Torch may fuse a product and a sum, which changes a code where a moved weight lies between two values."""
    weight, moments = problem()
    grid = fit_grid(weight, LayerPlan("layer", WeightSpec.parse(format, granularity, "mse", store), None), None)
    options = gptq.Options(sweeps=2)
    found = gptq.start(grid, options, [moments]).hard()
    uncompiled()
    expected = gptq.start(grid, options, [moments]).hard()
    assert (found == expected).float().mean() > 0.999
    losses = [(((values - weight) @ moments) * (values - weight)).sum().item() for values in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_one_column_after_another_moves_those_after_it():
    weight, _ = problem(5, 24)
    grid = fit_grid(weight, LayerPlan("layer", WeightSpec.parse("int8", "group:8", "absmax"), None), None)
    generator = torch.Generator().manual_seed(3)
    coupling, wanted = torch.randn(6, 6, generator=generator), weight[:, 3:9].T.contiguous()
    before, left, columns = wanted.clone() + 0.1, wanted.clone().double(), [9, 2, 20, 11, 7, 0]
    scales = grid.scales.decode().repeat_interleave(8, 1)
    expected = torch.empty(6, 5)
    for place, column in enumerate(columns):
        steps = (left[place].float() / scales[:, column]).round().clamp(-128, 127)
        expected[place] = steps * scales[:, column]
        left[place + 1 :] += coupling[place, place + 1 :, None].double() * (before[place] - expected[place])
    values = solving.round_in_turn(grid, columns, wanted, coupling, before)
    assert torch.equal(values, expected)
    assert torch.allclose(wanted.double(), left, atol=1e-5)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("rows", "granularity"), [(19, "group:16"), (3, "group:48"), (6, "channel"), (5, "tensor")])
def test_weighted_scales_have_no_more_error_than_those_of_the_eager_search(rows, granularity, store, uncompiled):
    generator, fmt = torch.Generator().manual_seed(1), get_format("fp4")
    groups = to_groups(torch.randn(rows, 100, generator=generator), WeightSpec.parse("fp4", granularity).granularity)
    weights = torch.rand(3, *groups.shape[1:], generator=generator) ** 4

    def errors(scales):
        scale = scales.decode().unsqueeze(-1)
        lost = fmt.round(groups / scale) * scale - groups
        return torch.stack([(lost.double().square() * each).sum(-1) for each in weights])

    found = torch.stack([errors(scales)[at] for at, scales in enumerate(fit_weighted(groups, fmt, store, weights))])
    uncompiled()
    best = torch.stack([errors(scales)[at] for at, scales in enumerate(fit_weighted(groups, fmt, store, weights))])
    assert (found <= best * (1 + 1e-5)).all()


SHAPES = st.sampled_from([((5, 48), -1), ((2, 3, 64), -1), ((2, 32, 3, 5), 1), ((32,), -1), ((16, 4, 3), -3)])
CASES = st.sampled_from([("token", "fp32"), ("group:16", "e4m3"), ("group:16", "bf16"), ("group:16", "e8m0")])


@settings(max_examples=80, deadline=None)
@given(SHAPES, CASES, st.sampled_from(FORMATS), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 999))
def test_inputs_are_rounded_bit_for_bit(shape_and_dim, case, format, dtype, seed):
    (shape, dim), (granularity, store) = shape_and_dim, case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(40 * torch.randn(shape, generator=generator))
    x[torch.rand(shape, generator=generator) < 0.2] = 0
    x[torch.rand(shape, generator=generator) < 0.01] = float("nan")
    x, spec = x.to(getattr(torch, dtype)), ActivationSpec.parse(format, granularity, store)
    expected, found = activations.fake_quantize(x, spec, dim), solving.fake_quantize(x, spec, dim)
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_what_is_not_compiled_is_left_to_others(uncompiled):
    x = torch.randn(4, 40)
    for spec in (ActivationSpec.parse("fp6", "group:16"), ActivationSpec.parse("lut4"), ActivationSpec.parse("int6")):
        assert solving.fake_quantize(x, spec, -1) is None
    uncompiled()
    spec = ActivationSpec.parse("fp6", "group:8")
    assert torch.equal(lookup.fake_quantize(x, spec, -1), activations.fake_quantize(x, spec))
