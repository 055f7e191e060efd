"""GPTQ against the algorithm in numpy and against what its loss has to be; what it gains on correlated inputs."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dmquant.calib.layers.moments import Moments, columns_of, fit_grid
from dmquant.convert import LayerPlan
from dmquant.errors import UserError
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.rounding import get_method, gptq
from dmquant.rounding.base import Box
from dmquant.rounding.gptq import Options
from dmquant.scaling import to_matrix

ROWS, COLUMNS, TOKENS = 128, 256, 4096
FORMATS = ["fp4", "fp6", "fp8", "int4"]


def ar(generator, columns=COLUMNS):
    noise, rho = torch.randn(TOKENS, columns, generator=generator), 0.95
    x = noise.clone()
    for column in range(1, columns):
        x[:, column] = rho * x[:, column - 1] + (1 - rho**2) ** 0.5 * noise[:, column]
    return x


def low_rank(generator, columns=COLUMNS):
    directions = torch.randn(columns // 8, columns, generator=generator) / (columns // 8) ** 0.5
    x = torch.randn(TOKENS, columns // 8, generator=generator) @ directions
    return x + 0.1 * torch.randn(TOKENS, columns, generator=generator)


def outliers(generator, columns=COLUMNS):
    x = ar(generator, columns)
    x[:, torch.randperm(columns, generator=generator)[:4]] *= 30
    return x


def iid(generator, columns=COLUMNS):
    return torch.randn(TOKENS, columns, generator=generator)


def weight_of(generator, rows=ROWS, columns=COLUMNS):
    """Normal times log-normal rows."""
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()


def grid_of(weight, format="fp4", granularity="channel", store="fp32", split=None):
    spec = WeightSpec.parse(format, granularity, "absmax", store, split)
    return fit_grid(weight, LayerPlan("layer", spec, None), None)


def error_of(values, weight, moments):
    lost = (values - weight).double()
    return ((lost @ moments.double()) * lost).sum().item()


@functools.cache
def problem(inputs):
    generator = torch.Generator().manual_seed(0)
    x, weight = inputs(generator), weight_of(generator)
    return weight, x.T @ x / len(x)


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs", [ar, low_rank, outliers])
def test_on_correlated_inputs_a_quarter_of_the_error_of_nearest_is_left_at_most(inputs, format, order):
    weight, moments = problem(inputs)
    grid = grid_of(weight, format)
    values = gptq.start(grid, Options(order=order), [moments]).hard()
    assert error_of(values, weight, moments) <= 0.25 * error_of(grid.nearest, weight, moments)


@pytest.mark.parametrize("format", FORMATS)
def test_on_independent_inputs_there_is_little_to_gain(format):
    weight, moments = problem(iid)
    grid = grid_of(weight, format)
    ratio = error_of(gptq.start(grid, Options(), [moments]).hard(), weight, moments)
    assert 0.85 <= ratio / error_of(grid.nearest, weight, moments) <= 1.0


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:48"])
@pytest.mark.parametrize("format", [*FORMATS, "fp4_e3m0", "lut4"])
def test_a_diagonal_gives_nearest_rounding_bit_for_bit(format, granularity):
    generator = torch.Generator().manual_seed(0)
    grid = grid_of(weight_of(generator, 24, 200), format, granularity, "bf16")
    moments = torch.rand(200, generator=generator).square() * 100
    moments[::7] = 0
    for diagonal in (torch.ones(200), moments):
        assert torch.equal(gptq.start(grid, Options(), [diagonal.diag()]).hard(), grid.nearest)


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("inputs", [ar, low_rank, outliers, iid])
def test_the_loss_is_the_output_error_with_damping(inputs, order):
    weight, moments = problem(inputs)
    moments = moments.double()
    factor = gptq.factorize([moments], Options(order=order, damping=0.02))
    values, loss = gptq.solve(grid_of(weight), factor)
    damped = moments + 0.02 * moments.diagonal().mean() * torch.eye(COLUMNS)
    lost = (values - weight).double()
    assert torch.allclose(loss, ((lost @ damped.double()) * lost).sum(1), rtol=1e-6)


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("granularity", ["channel", "group:48"])
def test_it_is_the_published_algorithm(granularity, order):
    """One column after another with the inverse recomputed by its own formula, H^-1 without the first row and column:
    no Cholesky factor, no blocks. In float64 throughout but for the grid."""
    generator = torch.Generator().manual_seed(1)
    x, weight = low_rank(generator, 150), weight_of(generator, 20, 150)
    moments = (x.T @ x / len(x)).double()
    grid = grid_of(weight, "int4", granularity)
    values, _ = gptq.solve(grid, gptq.factorize([moments], Options(order=order)))

    hessian = moments.numpy() + 0.01 * np.diag(moments.numpy()).mean() * np.eye(150)
    order_of = np.argsort(-np.diag(hessian), kind="stable") if order == "activation" else np.arange(150)
    inverse = np.linalg.inv(hessian[np.ix_(order_of, order_of)])
    size = 150 if granularity == "channel" else 48
    scales = grid.scales.decode().double().numpy().repeat(size, 1)[:, order_of]
    left, expected = weight.double().numpy()[:, order_of], np.empty((20, 150))
    for column in range(150):
        scale = scales[:, column]
        expected[:, order_of[column]] = rounded = np.clip(np.round(left[:, 0] / scale), -8, 7) * scale
        left = left[:, 1:] - np.outer((left[:, 0] - rounded) / inverse[0, 0], inverse[0, 1:])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    assert np.allclose(values.double().numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_values_survive_their_codes_bit_for_bit(format):
    weight, moments = problem(ar)
    grid = grid_of(weight, format, "group:48", "bf16")
    values = gptq.start(grid, Options(), [moments]).hard()
    assert torch.equal(QuantizedTensor.of(grid, values).dequantize(), values)


@pytest.mark.parametrize("order", ["activation", "given"])
def test_singular_moments_and_dead_columns_are_solved(order):
    generator = torch.Generator().manual_seed(0)
    weight = weight_of(generator)
    x = torch.randn(40, COLUMNS, generator=generator)  # fewer tokens than columns
    dead = torch.arange(0, COLUMNS, 5)
    x[:, dead] = 0
    moments, grid = x.T @ x / len(x), grid_of(weight)
    values = gptq.start(grid, Options(order=order, damping=1e-9), [moments]).hard()
    assert torch.isfinite(values).all()
    assert torch.equal(values[:, dead], grid.nearest[:, dead])
    assert error_of(values, weight, moments) < 0.5 * error_of(grid.nearest, weight, moments)


def test_damping_grows_until_the_moments_can_be_factorized():
    moments = torch.ones(8, 8) - 1e-3 * torch.eye(8)  # has a negative eigenvalue
    [(order, root)] = gptq.factorize([moments], Options(damping=1e-6, order="given"))
    damped = root.double() @ root.double().T
    added = (damped - moments).diagonal()
    assert (added > 1e-3).all()
    assert (added < 0.2).all()
    assert order.tolist() == list(range(8))


def test_moments_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="NaN or infinity"):
        gptq.factorize([torch.eye(4) * torch.tensor([1, 1, float("nan"), 1])], Options())


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("format", FORMATS)
def test_convolutions_are_solved_in_the_order_of_their_codes(format, split):
    """What autograd says of the outputs is what the moments say; GPTQ lowers it."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False).requires_grad_(False)
    layer.weight.data = torch.randn(16, 8, 3, 3, generator=generator)
    x = torch.nn.functional.avg_pool2d(torch.randn(24, 8, 20, 20, generator=generator), 5, 1, 2) + 0.5
    grid = grid_of(layer.weight, format, "group:16", "bf16", split)
    collected = Moments(grid.shape, grid.spec, torch.device("cpu"), together=72)
    collected.add(columns_of(layer, x))
    moments = collected.blocks()[0] / collected.tokens
    values = gptq.start(grid, Options(), [moments]).hard()

    def output(weight):
        return torch.nn.functional.conv2d(x, weight, padding=1, stride=2)

    def measured(values):
        lost = output(grid.as_weight(values) - layer.weight)
        return lost.square().sum().item() * 16 / lost.numel()

    for tried in (values, grid.nearest):
        assert error_of(tried, grid.weight, moments) == pytest.approx(measured(tried), rel=1e-3)
    assert measured(values) <= 0.35 * measured(grid.nearest)
    weight = torch.zeros(1, 8, 3, 3, requires_grad=True)
    positions = output(weight).numel()
    (slope,) = torch.autograd.grad(output(weight).square().sum() / positions, weight, create_graph=True)
    hessian = [torch.autograd.grad(slope.flatten()[index], weight, retain_graph=True)[0] for index in range(72)]
    by_autograd = to_matrix(torch.cat(hessian), split) / 2
    order = to_matrix(torch.arange(72).view(1, 8, 3, 3), split)[0]
    assert torch.allclose(by_autograd[order], moments, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("columns", [100, 256, 1000])
def test_wide_weights_are_solved_in_blocks_of_columns_as_if_the_others_were_exact(columns):
    weight, moments = problem(ar)
    grid = grid_of(weight, "fp4", "group:32", "bf16")
    spec = grid.spec
    collected = Moments((ROWS, COLUMNS), spec, torch.device("cpu"), together=columns)
    collected.add(ar(torch.Generator().manual_seed(0)))
    blocks = collected.blocks()
    assert max(map(len, blocks)) <= max(columns, 96)
    assert sum(map(len, blocks)) == COLUMNS
    values, first = gptq.start(grid, Options(), blocks).hard(), 0
    for block in blocks:
        part = slice(first, first + len(block))
        alone = grid_of(weight[:, part], "fp4", "group:32", "bf16")
        assert torch.equal(gptq.start(alone, Options(), [block]).hard(), values[:, part])
        first += len(block)
    assert error_of(values, weight, moments) <= 0.3 * error_of(grid.nearest, weight, moments)


@pytest.mark.parametrize("format", [*FORMATS, "lut4"])
@pytest.mark.parametrize("inputs", [ar, low_rank, outliers, iid])
def test_every_sweep_lowers_the_error_until_nothing_changes(inputs, format):
    weight, moments = problem(inputs)
    weight = weight[:32]
    grid = grid_of(weight, format, "channel" if format == "lut4" else "group:48", "bf16")
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(COLUMNS)
    errors, values = [], None
    for sweeps in (0, 1, 2, 4, 500, 501):
        before, values = values, gptq.start(grid, Options(sweeps=sweeps), [moments]).hard()
        errors.append(error_of(values, weight, damped))
    assert errors[1] < errors[0]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert torch.equal(values, before)
    assert torch.equal(QuantizedTensor.of(grid, values).dequantize(), values)


def test_after_the_last_sweep_no_single_weight_can_do_better():
    """By brute force: every weight in turn takes each of the format's values."""
    generator = torch.Generator().manual_seed(0)
    x, weight = low_rank(generator, 40), weight_of(generator, 3, 40)
    moments = x.T @ x / len(x)
    grid = grid_of(weight, "fp4", "group:8", "fp32")
    values = gptq.start(grid, Options(sweeps=1000), [moments]).hard()
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(40)
    least = error_of(values, weight, damped)
    scales = grid.scales.decode().repeat_interleave(8, 1)
    for row in range(3):
        for column in range(40):
            for value in grid.spec.fmt.values:
                tried = values.clone()
                tried[row, column] = value * scales[row, column]
                assert error_of(tried, weight, damped) >= least * (1 - 1e-5)


def test_a_sweep_over_a_diagonal_changes_nothing():
    weight, _ = problem(iid)
    grid = grid_of(weight, "fp4", "group:48", "bf16")
    moments = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(0))
    moments[::7] = 0
    assert torch.equal(gptq.start(grid, Options(sweeps=3), [moments.diag()]).hard(), grid.nearest)


@pytest.mark.parametrize("format", ["fp4", "int3", "nl4"])
def test_a_box_around_a_solution_has_it_as_the_nearer_end(format):
    generator = torch.Generator().manual_seed(0)
    x, weight = ar(generator, 64), weight_of(generator, 32, 64)
    grid, moments = grid_of(weight, format), [x.T @ x]
    options = Options(sweeps=30)
    values = gptq.start(grid, options, moments).values
    wanted = gptq.wanted(grid, moments, options, values)
    begun = replace(grid, solution=values, wanted=wanted)
    lower, upper, fraction = Box.around(begun)
    assert torch.equal(torch.where(fraction < 0.5, lower, upper), values)
    settled = replace(grid, weight=wanted).nearest == values  # coordinate descent ended where that is so
    assert settled.float().mean() > 0.999
    assert ((values - weight).abs() > 1.01 * grid.step).any()  # no box around the weight would hold it
    soft = torch.lerp(lower, upper, fraction)
    inside = settled & (upper > lower)
    assert (soft - wanted)[inside].abs().max() < 1e-4 * weight.abs().max()
    assert torch.equal(get_method("adaround").start(begun, get_method("adaround").Options()).hard(), values)
