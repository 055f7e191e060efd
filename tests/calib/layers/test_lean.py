"""LeanQuant's scales: weighted by what GPTQ's errors cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmquant.calib.layers.lean import POWERS, column_weights, fit_lean, fit_weighted, scales_of
from dmquant.formats import get_format
from dmquant.qtensor import WeightSpec, to_matrix
from dmquant.rounding import gptq
from dmquant.scaling import STORES, fit_mse
from tests.test_scale_rules import errors, groups_of


@pytest.mark.parametrize("store", STORES)
def test_weighted_scales_without_differences_are_those_of_least_weight_error(store):
    groups, fmt = groups_of(), get_format("fp4")
    found = errors(groups, fit_weighted(groups, fmt, store, torch.ones(1, 1, 64))[0].decode(), fmt)
    assert (found <= errors(groups, fit_mse(groups, fmt, store).decode(), fmt) * (1 + 1e-6)).all()


def test_weighted_scales_hold_those_that_count():
    groups, fmt = groups_of(), get_format("fp4")
    weights = torch.ones(1, 1, 64)
    weights[..., :4] = 1e4
    [found], plain = fit_weighted(groups, fmt, "fp32", weights), fit_mse(groups, fmt, "fp32")
    of_few = [errors(groups[..., :4], scales.decode(), fmt).sum() for scales in (found, plain)]
    assert of_few[0] < 0.7 * of_few[1]


def inputs(kind, columns=96, tokens=4096, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    if kind == "outliers":
        x[:, torch.randperm(columns, generator=generator)[:4]] *= 30
    else:
        for column in range(1, columns):
            x[:, column] = 0.95 * x[:, column - 1] + (1 - 0.95**2) ** 0.5 * x[:, column]
    return x.T @ x / tokens


def lean_case(kind="outliers", format="fp4", granularity="channel", store="bf16", rows=32):
    spec = WeightSpec.parse(format, granularity, "lean", store)
    return groups_of(rows, 96, 3).squeeze(1), spec, inputs(kind)


@pytest.mark.parametrize("order", ["activation", "given"])
def test_column_weights_are_conditional_variances(order):
    """h_j = 1 / (the diagonal of the inverse of the inverse), by numpy: the variance given the columns after j."""
    moments = inputs("correlated", 12).double()
    factors = gptq.factorize([moments], gptq.Options(order=order))
    damped = moments.numpy() + 0.01 * np.diag(moments.numpy()).mean() * np.eye(12)
    columns = factors[0].order.tolist()
    expected = np.empty(12)
    for place, column in enumerate(columns):
        inverse = np.linalg.inv(damped[np.ix_(columns[place:], columns[place:])])
        expected[column] = inverse[0, 0]
    found = column_weights(factors, 2).numpy()
    assert np.allclose(found / found[0], (expected / expected[0]) ** -2, rtol=1e-6)
    assert np.log(found).mean() == pytest.approx(0, abs=1e-9)
    assert torch.equal(column_weights(factors, 0), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["outliers", "correlated"])
@pytest.mark.parametrize(
    ("format", "granularity", "store"),
    [("fp4", "channel", "bf16"), ("fp4", "group:32", "bf16"), ("int4", "tensor", "fp32"), ("lut4", "channel", "table")],
)
def test_every_row_takes_the_power_of_its_least_loss_where_it_has_scales_of_its_own(kind, format, granularity, store):
    matrix, spec, moments = lean_case(kind, format, granularity, store)
    factors = gptq.factorize([moments], gptq.Options())
    by_power = scales_of(matrix, spec, (32, 96), factors, POWERS)
    losses = [gptq.solve(spec.grid_type(matrix, spec, scales, (32, 96)), factors)[1] for scales in by_power]
    chosen = fit_lean(matrix, spec, (32, 96), factors)
    values, loss = gptq.solve(replace(chosen, solution=None), factors)
    least = torch.stack(losses).amin(0) if granularity != "tensor" else min(losses, key=torch.sum)
    assert torch.allclose(loss, least, rtol=1e-4)
    assert torch.equal(chosen.solution, values)
    assert torch.equal(gptq.start(chosen, gptq.Options(), [moments]).hard(), values)


def test_with_outlier_inputs_lean_scales_halve_the_error_of_those_by_weight_error():
    matrix, spec, moments = lean_case()
    factors = gptq.factorize([moments], gptq.Options())
    plain = fit_mse(matrix.unsqueeze(1), spec.fmt, spec.store)
    lean = fit_lean(matrix, spec, (32, 96), factors).scales
    losses = [gptq.solve(spec.grid_type(matrix, spec, scales, (32, 96)), factors)[1].sum() for scales in (lean, plain)]
    assert losses[0] <= 0.5 * losses[1]


def test_groups_of_a_split_convolution_are_weighted_by_their_own_columns():
    generator, shape = torch.Generator().manual_seed(0), (6, 10, 3, 3)
    spec, moments = WeightSpec.parse("fp4", "group:16", "lean", split=4), inputs("outliers", 90)
    matrix = to_matrix(torch.randn(shape, generator=generator), 4)
    factors = gptq.factorize([moments], gptq.Options())
    [found] = scales_of(matrix, spec, shape, factors, [1])
    weights = column_weights(factors, 1)
    for part, start, width in ((0, 0, 16), (2, 32, 4), (3, 36, 16), (6, 84, 6)):
        own = weights[start : start + width]
        group = matrix[:, None, start : start + width]
        [alone] = fit_weighted(group, spec.fmt, spec.store, (own / own.max()).float().view(1, 1, -1))
        assert torch.equal(found.stored[:, part], alone.stored[:, 0])
