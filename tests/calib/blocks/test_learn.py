"""Learning a unit: what it gains on correlated inputs, that it never loses to nearest rounding, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.calib.blocks.learn import (
    computing_in,
    learn,
    learning_layers,
    spread_batch,
)
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import fit_grid
from dmquant.calib.objectives import UnitData, mse, squared_error
from dmquant.convert import LayerPlan
from dmquant.errors import UserError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Learning
from dmquant.rounding import get_method

COLUMNS, ROWS, TOKENS = 64, 96, 16
LEARNING, HELD_OUT = range(96), range(96, 128)
OPTIONS = {"iterations": 300, "batch_size": 16, "learning_rate": 0.1, "checks": 3}


def ar(samples, generator, correlation=0.95):
    """Neighbouring channels correlated by `correlation`, as in an AR(1) process of variance 1."""
    noise = torch.randn(samples * TOKENS, COLUMNS, generator=generator)
    x = noise.clone()
    for column in range(1, COLUMNS):
        x[:, column] = correlation * x[:, column - 1] + math.sqrt(1 - correlation**2) * noise[:, column]
    return x.view(samples, TOKENS, COLUMNS)


def low_rank(samples, generator, rank=8):
    directions = torch.randn(rank, COLUMNS, generator=generator) / math.sqrt(rank)
    noise = 0.1 * torch.randn(samples, TOKENS, COLUMNS, generator=generator)
    return torch.randn(samples, TOKENS, rank, generator=generator) @ directions + noise


def iid(samples, generator):
    return torch.randn(samples, TOKENS, COLUMNS, generator=generator)


def problem(inputs, format="fp4", activations=None, method="adaround", **options):
    """One Linear layer as a unit: its learners and data."""
    generator = torch.Generator().manual_seed(0)
    x = inputs(len(LEARNING) + len(HELD_OUT), generator)
    layer = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    layer.weight.data = torch.randn(ROWS, COLUMNS, generator=generator) / math.sqrt(COLUMNS)
    layer.bias.data = torch.randn(ROWS, generator=generator)
    spec = WeightSpec.parse(format, "group:32", "mse")
    grid = fit_grid(layer.weight, LayerPlan("layer", spec, None), None)
    quantized = QUANTIZED[nn.Linear].like(layer, spec, activations, device="meta")
    chosen = get_method(method)
    learner = Learner("layer", layer, grid, chosen.start(grid, chosen.Options(**options)), quantized)
    target = layer(x)
    data = UnitData(
        run=lambda batch, generator: layer(x[list(batch)]),
        target=lambda batch: target[list(batch)],
        learning=LEARNING,
        held_out=HELD_OUT,
    )
    return learner, data, x


def silent(step, loss):
    pass


def learned(case, report=silent, **changes):
    learner, data, _ = case
    with learning_layers([learner]):
        return learn("layer", [learner], mse.start(data, mse.Options()), Learning(**OPTIONS | changes), report)


# 0.01 is 0.1 times a typical step of these weights: what scale-aware learning at 0.1 would be for plain learning.
@pytest.mark.parametrize(("scale_aware", "learning_rate"), [(False, 0.1), (True, 0.01)])
@pytest.mark.parametrize("format", ["fp4", "fp4_e1m2", "fp4_e3m0", "fp6", "int4"])
@pytest.mark.parametrize("inputs", [ar, low_rank])
def test_on_correlated_inputs_most_of_the_error_of_nearest_rounding_goes(inputs, format, scale_aware, learning_rate):
    """Held out, 0.13 to 0.35 of it is left."""
    done, _ = learned(problem(inputs, format, scale_aware=scale_aware), learning_rate=learning_rate)
    assert done.error <= 0.45 * done.nearest_error
    assert done.undecided < 0.01


@pytest.mark.parametrize("learning_rate", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize("format", ["fp4", "fp6", "int4"])
def test_where_there_is_nothing_to_gain_it_is_never_worse_than_nearest(format, learning_rate):
    case = problem(iid, format)
    done, kept = learned(case, learning_rate=learning_rate, iterations=60)
    assert done.error <= done.nearest_error
    assert torch.equal(kept["layer"].values, case[0].grid.nearest) == (done.best_step == 0)


def test_the_errors_told_are_those_of_the_values_kept():
    case = problem(ar)
    learner, _, x = case
    done, kept = learned(case)
    held_out = list(HELD_OUT)

    def error(weight):
        return ((x[held_out] @ (weight - learner.layer.weight).T).square().mean()).item()

    assert done.error == pytest.approx(error(kept["layer"].values), rel=1e-4)
    assert done.nearest_error == pytest.approx(error(learner.grid.nearest), rel=1e-4)
    assert done.best_step in (100, 200, 300)
    lower, upper = learner.grid.neighbours
    assert ((kept["layer"].values == lower) | (kept["layer"].values == upper)).all()


def test_it_repeats_bit_for_bit_and_follows_its_seed():
    first, again, other = (learned(problem(ar), iterations=40, seed=seed)[1]["layer"].values for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_units_of_any_magnitude_are_learned_alike():
    """The loss is relative to nearest rounding, so one regularizer and one rate serve all."""
    small, large = problem(ar), problem(ar)
    learner, data, x = large
    learner.layer.weight.data *= 64
    learner.layer.bias.data *= 64
    spec = learner.grid.spec
    grid = fit_grid(learner.layer.weight, LayerPlan("layer", spec, None), None)
    method = get_method("adaround")
    large_learner = Learner("layer", learner.layer, grid, method.start(grid, method.Options()), learner.quantized)
    targets = learner.layer(x)
    large_data = UnitData(data.run, lambda batch: targets[list(batch)], LEARNING, HELD_OUT)
    expected = learned(small, iterations=50)[1]["layer"].values
    assert torch.equal(learned((large_learner, large_data, x), iterations=50)[1]["layer"].values, 64 * expected)


def test_without_the_regularizer_weights_stay_undecided():
    done, _ = learned(problem(ar, regularizer=0.0))
    assert done.undecided > 0.3


@pytest.mark.parametrize(("method", "iterations"), [("nearest", 100), ("adaround", 0)])
def test_with_nothing_to_learn_nearest_rounding_is_kept(method, iterations):
    case = problem(ar, method=method)
    done, kept = learned(case, iterations=iterations)
    assert (done.error, done.best_step, done.undecided) == (done.nearest_error, 0, 0.0)
    assert torch.equal(kept["layer"].values, case[0].grid.nearest)


def test_progress_is_told_with_the_loss_of_nearest_rounding_as_one():
    told = []
    learned(problem(ar), lambda step, loss: told.append((step, loss)), iterations=25)
    assert [step for step, _ in told] == [10, 20, 25]
    assert all(0 < loss < 1.5 for _, loss in told)


def test_inputs_are_quantized_and_gradients_go_straight_through():
    activations = ActivationSpec.parse("fp4", "token")
    (learner, _, x), batch = problem(ar, activations=activations), [0, 1]
    layer, seen = learner.layer, learner.quantized.quantize_input(x[batch])
    assert not torch.equal(seen, x[batch])
    learner.values, given = learner.grid.nearest, x[batch].clone().requires_grad_()
    with learning_layers([learner]):
        output = layer(given)
    assert torch.allclose(output, torch.nn.functional.linear(seen, learner.grid.nearest, layer.bias), atol=1e-5)
    output.sum().backward()
    assert torch.allclose(given.grad, learner.grid.nearest.sum(0).expand_as(given), atol=1e-5)


def test_layers_are_themselves_again_afterwards():
    learner, data, x = problem(ar)
    before = learner.layer(x[:1])
    with learning_layers([learner]):
        soft = learner.layer(x[:1])
    assert soft.grad_fn is not None
    assert torch.allclose(soft, torch.nn.functional.linear(x[:1], learner.rounding(), learner.layer.bias), atol=1e-5)
    learned((learner, data, x), iterations=10)
    assert learner.values is None
    assert "forward" not in vars(learner.layer)
    assert torch.equal(learner.layer(x[:1]), before)


@pytest.mark.parametrize(("groups", "split"), [(1, None), (2, None), (1, 3)])
def test_convolutions_learn_with_their_own_geometry(groups, split):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups).requires_grad_(False)
    spec = WeightSpec.parse("fp4", "channel", "mse", split=split)
    grid = fit_grid(layer.weight, LayerPlan("conv", spec, None), None)
    method = get_method("adaround")
    quantized = QUANTIZED[nn.Conv2d].like(layer, spec, None, device="meta")
    learner = Learner("conv", layer, grid, method.start(grid, method.Options()), quantized)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(96, 4, 16, 16, generator=generator), 5, 1) + 1
    target = layer(smooth)
    data = UnitData(
        lambda batch, _: layer(smooth[list(batch)]), lambda batch: target[list(batch)], range(64), range(64, 96)
    )
    done, kept = learned((learner, data, smooth))
    assert done.error <= 0.7 * done.nearest_error
    quantized.load_quantized(kept["conv"].quantized(), layer.bias)
    error = (quantized(smooth[64:]) - target[64:]).square().mean().item()
    assert error == pytest.approx(done.error, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_unit(bad):
    learner, data, x = problem(ar)
    x[HELD_OUT[0], 0, 0] = bad
    with pytest.raises(UserError, match=r"the error of layer is (nan|inf): its activations hold NaN or infinity"):
        learned((learner, data, x))


@pytest.mark.parametrize(("bad", "step"), [(math.nan, 10), (math.inf, 10), (1e4, 10)])
def test_where_the_loss_diverges_learning_ends_and_the_best_is_kept(bad, step):
    learner, data, x = problem(ar)
    kept_before = learned((learner, data, x), iterations=0)[1]["layer"].values
    told = []
    x[list(LEARNING)] *= bad
    done, kept = learned((learner, data, x), lambda step, loss: told.append(step))
    assert (done.diverged, done.best_step, done.error) == (step, 0, done.nearest_error)
    assert torch.equal(kept["layer"].values, kept_before)
    assert not told
    assert "forward" not in vars(learner.layer)


def test_scales_that_run_away_leave_the_best_that_was_tried():
    done, kept = learned(problem(ar, method="flexround"), learning_rate=50.0, checks=100)
    assert 10 <= done.diverged < 300
    assert done.error <= done.nearest_error
    assert kept["layer"].values.isfinite().all()
    assert learned(problem(ar, method="flexround"), learning_rate=1e-3)[0].diverged is None


def test_a_loss_that_is_large_once_is_no_divergence():
    learner, data, x = problem(ar)
    passes = []

    def target(batch):
        passes.append(batch)
        return data.target(batch) * (1e3 if len(passes) == 30 else 1)

    done, _ = learned((learner, UnitData(data.run, target, LEARNING, HELD_OUT), x), iterations=60)
    assert done.diverged is None


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 300), size=st.integers(1, 64), seed=st.integers(0, 10_000))
def test_a_batch_holds_one_sample_of_every_part(count, size, seed):
    samples = list(range(1000, 1000 + count))
    batch = spread_batch(samples, size, torch.Generator().manual_seed(seed))
    assert len(batch) == size
    for part, sample in enumerate(batch):
        assert math.floor(part * count / size) <= sample - 1000 < max(math.ceil((part + 1) * count / size), 1)


def test_the_error_of_nested_outputs_is_the_mean_over_their_tensors():
    one = (torch.zeros(2, 3), [torch.zeros(4, dtype=torch.bfloat16)], torch.zeros(2, dtype=torch.int64))
    other = (torch.full((2, 3), 2.0), [torch.ones(4, dtype=torch.bfloat16)], torch.ones(2, dtype=torch.int64))
    assert squared_error(one, other).item() == (4 + 1) / 2


def test_a_module_computes_in_another_dtype_for_a_while():
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before, x = {name: tensor.clone() for name, tensor in module.state_dict().items()}, torch.randn(4, 8)
    exact = module(x)
    with computing_in(module, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert torch.allclose(module(x).float(), exact, atol=0.1)
    with pytest.raises(RuntimeError), computing_in(module, torch.bfloat16):
        module(torch.randn(4, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module(x), exact)
