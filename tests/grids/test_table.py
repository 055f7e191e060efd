"""Tables of 16 values a row: k-means against one in numpy, and layers that are made of them."""

import numpy as np
import pytest
import torch
from torch import nn

from dmquant.calib.layers.lean import scales_of
from dmquant.convert import quantize_
from dmquant.grids import TableGrid
from dmquant.grids.kmeans import SIZE, fit_table
from dmquant.layers import quantize_layer
from dmquant.pipelines.runs.footprint import footprint
from dmquant.qtensor import QuantizedTensor, WeightSpec, quantize
from dmquant.recipe import Recipe
from dmquant.rounding import gptq
from tests.calib.layers.test_lean import inputs
from tests.calib.runs import PART_OF_UNET, calibrated, captured, is_same, quantized_layers, recipe_of, saved_and_loaded

SPEC = WeightSpec.parse("lut4", "channel", "mse", "table")
LEAN = {"weights": "lut4", "granularity": "channel", "scale": "lean", "store": "table", "rounding": "gptq"}


def matrix_of(rows=12, columns=200, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def k_means(values, weights, starts=15):
    """The least weighted squared error of Lloyd's algorithm from random values, in numpy."""
    generator, least = np.random.default_rng(0), np.inf
    for _ in range(starts):
        centers = np.sort(generator.choice(values, SIZE, replace=False))
        for _ in range(100):
            nearest = np.abs(values[:, None] - centers).argmin(1)
            for index in range(SIZE):
                if weights[nearest == index].sum() > 0:
                    centers[index] = np.average(values[nearest == index], weights=weights[nearest == index])
        error = (weights * np.abs(values[:, None] - centers).min(1) ** 2).sum()
        least = min(least, error)
    return least


def error_of(matrix, tables, weights):
    distance = (matrix.double()[..., None] - tables.double()[:, None]).abs().amin(-1)
    return (distance.square() * weights).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_tables_are_weighted_k_means(weighted):
    matrix = matrix_of(6, 300)
    weights = torch.logspace(-2, 2, 300, dtype=torch.float64) if weighted else torch.ones(300, dtype=torch.float64)
    tables = fit_table(matrix, weights if weighted else None).decode()
    assert tables.shape == (6, SIZE)
    assert (tables.diff(dim=1) >= 0).all()
    ratios = [
        error.item() / k_means(row, weights.numpy())
        for row, error in zip(matrix.double().numpy(), error_of(matrix, tables, weights), strict=True)
    ]
    assert np.mean(ratios) <= 1.1


def test_weights_that_are_all_alike_change_nothing():
    matrix = matrix_of()
    plain = fit_table(matrix).stored
    assert torch.equal(fit_table(matrix, torch.full((200,), 7.0)).stored, plain)
    factors = gptq.factorize([torch.eye(200)], gptq.Options())
    spec = WeightSpec.parse("lut4", "channel", "lean", "table")
    for found in scales_of(matrix, spec, (12, 200), factors, (0, 1, 4)):
        assert torch.equal(found.stored, plain)


def test_power_zero_is_plain_k_means_whatever_the_inputs():
    matrix, factors = matrix_of(columns=96), gptq.factorize([inputs("outliers")], gptq.Options())
    spec = WeightSpec.parse("lut4", "channel", "lean", "table")
    assert torch.equal(scales_of(matrix, spec, (12, 96), factors, [0])[0].stored, fit_table(matrix).stored)


def test_with_outlier_inputs_power_four_has_half_the_error_of_power_zero_at_most():
    matrix, moments = matrix_of(64, 128), inputs("outliers", 128)
    spec = WeightSpec.parse("lut4", "channel", "lean", "table")
    factors = gptq.factorize([moments], gptq.Options())
    error = {}
    for power, scales in zip((0, 4), scales_of(matrix, spec, (64, 128), factors, (0, 4)), strict=True):
        grid = spec.grid_type(matrix, spec, scales, (64, 128))
        lost = (gptq.solve(grid, factors)[0] - matrix).double()
        error[power] = ((lost @ moments.double()) * lost).sum().item()
    assert error[4] <= 0.5 * error[0]


@pytest.mark.parametrize("columns", [1, 5, 16, 33])
def test_rows_of_few_or_equal_values_are_exact(columns):
    matrix = matrix_of(6, columns).bfloat16().float()
    matrix[0] = 0.5
    matrix[1, ::2] = 0
    quantized = quantize(matrix, SPEC)
    exact = [row for row in range(6) if len(matrix[row].unique()) <= 4]
    assert 0 in exact
    assert torch.equal(quantized.dequantize()[exact], matrix[exact])


def test_codes_are_of_the_nearest_entry_and_a_row_has_sixteen_values_at_most():
    matrix = matrix_of()
    quantized = quantize(matrix, SPEC)
    tables, values = quantized.scale, quantized.dequantize()
    assert torch.equal((values - matrix).abs(), (matrix[..., None] - tables[:, None]).abs().amin(-1))
    assert all(len(row.unique()) <= SIZE for row in values)
    grid = TableGrid(matrix, SPEC, quantized.scales, (12, 200))
    assert torch.equal(QuantizedTensor.of(grid, values).codes, quantized.codes)
    assert torch.equal(grid.nearest, values)
    lower, upper = grid.neighbours
    assert torch.equal(torch.minimum((lower - matrix).abs(), (upper - matrix).abs()), (values - matrix).abs())
    assert ((lower <= matrix) | (lower == tables[:, :1])).all()
    assert torch.equal(grid.step[lower < upper], (upper - lower)[lower < upper])
    assert torch.equal(torch.stack([grid.round_column(matrix[:, 3], 3)]), values[:, 3].unsqueeze(0))


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("layer", [nn.Linear(24, 10), nn.Conv2d(6, 10, 3, padding=1)])
def test_layers_compute_with_their_tables_and_count_them(layer, split):
    spec = WeightSpec.parse("lut4", "channel", "mse", "table", split)
    quantized = quantize_layer(layer, spec, None)
    columns = layer.weight[0].numel()
    assert quantized.scale.shape == (10, 2 * SIZE)
    relative = (quantized.weight - layer.weight).square().sum() / layer.weight.square().sum()
    assert relative < 0.02
    found = footprint(nn.Sequential(quantized))
    assert found.bits_per_weight == pytest.approx(8 * (-(-columns // 2) * 10 + 10 * 2 * SIZE) / (10 * columns))
    x = torch.randn(2, 24) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 5, 5)
    exact = (
        nn.functional.linear if isinstance(layer, nn.Linear) else lambda *args: nn.functional.conv2d(*args, padding=1)
    )
    assert torch.allclose(quantized(x), exact(x, quantized.weight.data, layer.bias))


def test_a_model_without_data_is_made_of_tables():
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 4))
    settings = {"weights": "lut4", "granularity": "channel", "scale": "mse", "store": "table"}
    quantize_(model, Recipe.model_validate({"name": "x", **settings}))
    assert all(layer.weight_spec.store == "table" for layer in model)


@pytest.mark.parametrize("model", ["pixart-sigma", "sd15"])
def test_calibrated_models_are_saved_and_read_back_bit_for_bit(model, tmp_path):
    case = captured(model, tmp_path / "data")
    recipe = recipe_of(PART_OF_UNET if model == "sd15" else (), keep=False, **LEAN)
    backbone, done = calibrated(case, recipe, tmp_path / "out")
    assert is_same(calibrated(case, recipe, tmp_path / "out")[0], backbone)  # from the blocks on disk
    assert any(task["solved"] for block in done.blocks for task in block["tasks"])
    assert all(layer.weight_spec.store == "table" for layer in quantized_layers(backbone).values())
    assert is_same(saved_and_loaded(model, backbone, done.recipe, tmp_path / "saved"), backbone)
