"""Roundings of one weight: what they start from, what they may become, and what AdaRound's penalty is worth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.layers.moments import fit_grid
from dmquant.convert import LayerPlan
from dmquant.errors import UsageError
from dmquant.grids import ScaledGrid
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.recipe import Recipe
from dmquant.rounding import get_method, method_names

FORMATS = ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6", "fp6_e3m2", "int4", "lut4"]
BOTH = pytest.mark.parametrize("scale_aware", [False, True])
ADAROUND = get_method("adaround")


def grid_of(format="fp4", granularity="group:16", scale="absmax", shape=(12, 40), seed=0):
    """The last group of each row is shorter than the others."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    spec = WeightSpec.parse(format, granularity, scale)
    return ScaledGrid(weight, spec, ScaledGrid.fit(weight, spec, spec.segments(shape)), shape)


def clipping_grid(format="fp4"):
    """Scales half of what absmax takes, so that many weights lie beyond the end of their grid."""
    grid = grid_of(format)
    halved = type(grid.scales)(grid.scales.stored / 2, grid.scales.base, grid.scales.store)
    return ScaledGrid(grid.weight, grid.spec, halved, grid.shape)


def adaround(grid, **options):
    return ADAROUND.start(grid, ADAROUND.Options(**options))


def with_gates(rounding, grid, gate):
    """`rounding` with h(V) set to `gate` everywhere."""
    v = torch.logit(torch.tensor((gate - ADAROUND.GAMMA) / (ADAROUND.ZETA - ADAROUND.GAMMA)))
    rounding.v.data = v * (grid.step if rounding.step is not None else torch.ones_like(grid.weight))
    return rounding


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_complete(name):
    method, grid = get_method(name), grid_of()
    assert isinstance(method.LEARNS, bool)
    assert isinstance(method.NEEDS_MOMENTS, bool)
    moments = ([torch.eye(grid.weight.shape[1])],) if method.NEEDS_MOMENTS else ()
    rounding = method.start(grid, method.Options(), *moments)
    learnable = bool(list(rounding.parameters()))
    assert learnable == method.LEARNS
    assert rounding().shape == rounding.hard().shape == grid.weight.shape
    assert 0 <= rounding.undecided() <= grid.weight.numel()
    lower, upper = grid.neighbours
    assert ((rounding.hard() == lower) | (rounding.hard() == upper)).all()


@BOTH
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", ["group:16", "channel", "tensor"])
def test_soft_weights_start_as_the_float_weights(format, granularity, scale_aware):
    grid = grid_of(format, granularity)
    rounding = adaround(grid, scale_aware=scale_aware)
    lower, upper = grid.neighbours
    inside = upper > lower
    assert inside.float().mean() > 0.9
    distance = (rounding() - grid.weight).abs() / grid.step
    assert distance[inside].max() <= 2e-6
    on_grid_or_beyond = ~inside
    assert torch.equal(rounding()[on_grid_or_beyond], lower[on_grid_or_beyond])


@BOTH
@pytest.mark.parametrize("format", FORMATS)
def test_hard_weights_are_neighbours_whatever_was_learned_and_nearest_at_the_start(format, scale_aware):
    grid = grid_of(format)
    rounding = adaround(grid, scale_aware=scale_aware)
    lower, upper = grid.neighbours
    start = rounding.hard()
    tie = (grid.fraction() - 0.5).abs() < 1e-4
    assert torch.equal(start[~tie], grid.nearest[~tie])
    rounding.v.data = torch.randn(grid.weight.shape, generator=torch.Generator().manual_seed(1))
    hard = rounding.hard()
    assert ((hard == lower) | (hard == upper)).all()
    assert (hard != start).any()
    assert (hard - grid.weight).abs().le(grid.step * (1 + 1e-6)).all()


@BOTH
@pytest.mark.parametrize("format", FORMATS)
def test_hard_weights_survive_their_codes_bit_for_bit(format, scale_aware):
    grid = grid_of(format, "group:16", "mse")
    rounding = adaround(grid, scale_aware=scale_aware)
    rounding.v.data = torch.randn(grid.weight.shape, generator=torch.Generator().manual_seed(2))
    for values in (rounding.hard(), grid.nearest):
        assert torch.equal(QuantizedTensor.of(grid, values).dequantize(), values)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    store=st.sampled_from(["bf16", "fp32", "e8m0", "pow2"]),
    kernel=st.sampled_from([(), (1, 1), (3, 2)]),
    split=st.none() | st.integers(1, 39),
    seed=st.integers(0, 1000),
)
def test_any_choice_of_neighbours_survives_its_codes(format, rows, columns, exponent, store, kernel, split, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, *kernel, generator=generator) * 2.0**exponent
    spec = WeightSpec.parse(format, "group:16", store=store, split=split if split and split < columns else None)
    grid = fit_grid(weight, LayerPlan("layer", spec, None), None)
    lower, upper = grid.neighbours
    assert (lower <= upper).all()
    assert torch.equal(grid.as_weight(grid.weight), weight)
    values = torch.where(torch.rand(lower.shape, generator=generator) < 0.5, lower, upper)
    assert torch.equal(QuantizedTensor.of(grid, values).dequantize(), grid.as_weight(values))


@BOTH
@pytest.mark.parametrize("format", FORMATS)
def test_clipped_weights_stay_at_the_end_of_their_grid(format, scale_aware):
    grid = clipping_grid(format)
    lower, upper = grid.neighbours
    clipped = lower == upper
    assert clipped.float().mean() > 0.02
    rounding = adaround(grid, scale_aware=scale_aware)
    rounding().sum().backward()
    assert rounding.v.grad[clipped].abs().max() == 0
    rounding.v.data += torch.randn(grid.weight.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rounding()[clipped], lower[clipped])
    assert torch.equal(rounding.hard()[clipped], lower[clipped])
    assert torch.equal(grid.nearest[clipped], lower[clipped])


@BOTH
def test_the_gradient_of_the_soft_weights_is_that_of_finite_differences(scale_aware):
    grid = grid_of()
    rounding = adaround(grid, scale_aware=scale_aware)
    rounding().sum().backward()
    start, h = rounding.v.detach().clone(), 1e-3
    steps = h * (grid.step if scale_aware else torch.ones_like(start))
    with torch.no_grad():
        rounding.v.copy_(start + steps)
        above = rounding()
        rounding.v.copy_(start - steps)
        below = rounding()
    numeric = (above - below) / (2 * steps)
    smooth = (grid.fraction() - 0.5).abs() < 0.49  # the gate has a corner at its ends
    assert torch.allclose(rounding.v.grad[smooth], numeric[smooth], atol=2e-3 * numeric.abs().max())


@BOTH
def test_the_penalty_is_nothing_for_decided_gates_and_the_regularizer_for_each_undecided_one(scale_aware):
    grid = grid_of()
    rounding = adaround(grid, regularizer=7.0, scale_aware=scale_aware)
    count = grid.weight.numel()
    for progress in (0.2, 0.5, 1.0):
        for decided in (0.0, 1.0):
            assert with_gates(rounding, grid, decided).penalty(progress).item() == pytest.approx(0, abs=1e-3)
        assert with_gates(rounding, grid, 0.5).penalty(progress).item() == pytest.approx(7.0 * count, rel=1e-5)


@BOTH
def test_the_penalty_waits_for_the_warmup_and_sharpens_linearly(scale_aware):
    grid = grid_of()
    rounding = with_gates(
        adaround(grid, regularizer=1.0, warmup=0.4, beta=(20.0, 2.0), scale_aware=scale_aware), grid, 0.9
    )
    assert rounding.penalty(0.0) is None
    assert rounding.penalty(0.399) is None
    count = grid.weight.numel()
    for progress, beta in ((0.4, 20.0), (0.7, 11.0), (1.0, 2.0)):
        assert rounding.penalty(progress).item() == pytest.approx(count * (1 - 0.8**beta), rel=1e-4)


def test_the_penalty_pushes_a_gate_to_the_end_that_is_nearer():
    grid = grid_of()
    rounding = adaround(grid, regularizer=1.0)
    rounding.penalty(0.9).backward()
    gate, movable = grid.fraction(), grid.neighbours[0] < grid.neighbours[1]
    low, high = movable & (gate < 0.49) & (gate > 0.01), movable & (gate > 0.51) & (gate < 0.99)
    assert (rounding.v.grad[low] > 0).all()
    assert (rounding.v.grad[high] < 0).all()


def test_weights_are_counted_as_undecided_until_their_gate_is_at_an_end():
    grid = grid_of()
    rounding = adaround(grid)
    lower, upper = grid.neighbours
    strictly_inside = (upper > lower) & (grid.fraction() > 1e-6) & (grid.fraction() < 1 - 1e-6)
    assert rounding.undecided() == int(strictly_inside.sum())
    rounding.v.data = torch.where(rounding.v >= 0, 5.0, -5.0)
    assert rounding.undecided() == 0
    assert torch.equal(rounding(), rounding.hard())


def test_scale_aware_learning_is_plain_learning_at_a_rate_divided_by_each_step():
    """One step of Adam moves V' by the rate, so V = V' / step by the rate over the step."""
    grid = grid_of()
    plain, aware = adaround(grid), adaround(grid, scale_aware=True)
    for rounding in (plain, aware):
        optimizer = torch.optim.Adam(rounding.parameters(), lr=1e-3, eps=0)
        before = rounding.v.detach().clone()
        (rounding() - 1.0).square().sum().backward()
        optimizer.step()
        rounding.moved = (rounding.v - before).detach()
    movable = plain.v.grad != 0
    assert movable.float().mean() > 0.9
    ratio = (aware.moved / grid.step)[movable] / plain.moved[movable]
    assert torch.allclose(ratio, 1 / grid.step[movable], rtol=5e-3)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("adaruond", "unknown rounding method 'adaruond': did you mean 'adaround'"),
        ("grid", "unknown rounding method 'grid'"),
        ({"method": "adaround", "scale_awre": True}, "unknown key 'scale_awre': did you mean 'scale_aware'"),
        ({"method": "adaround", "warmup": 1.0}, "less than 1"),
        ({"method": "nearest", "beta": [20, 2]}, "unknown key 'beta'"),
    ],
)
def test_a_wrong_choice_is_a_usage_error_of_one_line(choice, message):
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.load("rtn").with_settings(rounding=choice)
    assert "\n" not in str(caught.value)
