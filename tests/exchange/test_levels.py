"""Tables of integers by group: against brute force, and solved by GPTQ."""

import pytest
import torch

from dmquant.calib.layers.lean import fit_lean
from dmquant.errors import UsageError
from dmquant.exchange.levels import LARGEST, LevelGrid, fit_levels
from dmquant.formats import get_format
from dmquant.qtensor import QuantizedTensor, WeightSpec, quantize
from dmquant.rounding import gptq
from tests.calib.layers.test_lean import inputs

SPEC = WeightSpec.parse("lut4_gaussian", "group:16", "mse", "levels")


def matrix_of(rows=12, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def levels(quantized):
    """The integers that a group's codes stand for, as comfy-kitchen makes them, and their scale, by brute force."""
    relative = get_format("fp8_e4m3").decode(quantized.scales.stored)
    values = quantized.spec.fmt.values
    whole = (values * relative[..., None]).round().clamp(-LARGEST, LARGEST)
    return whole * quantized.scales.base[..., None]


def test_codes_are_of_the_nearest_integer_of_their_group():
    matrix = matrix_of()
    quantized = quantize(matrix, SPEC)
    tables, values = levels(quantized).repeat_interleave(16, 1), quantized.dequantize()
    assert (values / quantized.scales.base).round().abs().amax() <= LARGEST
    assert torch.equal((values - matrix).abs(), (matrix[..., None] - tables).abs().amin(-1))
    grid = LevelGrid(matrix, SPEC, quantized.scales, (12, 96))
    assert torch.equal(QuantizedTensor.of(grid, values).codes, quantized.codes)
    assert torch.equal(grid.nearest, values)
    lower, upper = grid.neighbours
    assert torch.equal(torch.minimum((lower - matrix).abs(), (upper - matrix).abs()), (values - matrix).abs())
    assert torch.equal(torch.stack([grid.round_column(matrix[:, at], at) for at in range(96)], 1), values)


def test_scales_of_least_error_are_no_worse_than_absmax_and_weights_count():
    matrix = matrix_of()
    heavy = torch.ones(96)
    heavy[::16] = 1e4
    plain, weighted = fit_levels(matrix, SPEC, None, [torch.ones(96), heavy])
    lost = [(LevelGrid(matrix, SPEC, scales, (12, 96)).nearest - matrix).square() for scales in (plain, weighted)]
    assert lost[0].sum() <= lost[1].sum()
    assert lost[1][:, ::16].sum() < 0.7 * lost[0][:, ::16].sum()
    assert lost[0].sum() < 0.008 * matrix.square().sum()


def test_a_table_of_eight_more_values_or_other_granularity_has_no_levels():
    for format, granularity, scale, message in (
        ("int4", "group:16", "mse", "levels goes with a lut4 format"),
        ("lut4", "channel", "mse", "levels goes with a lut4 format"),
        ("lut4", "group:16", "absmax", "fitted by scale: mse or lean"),
    ):
        with pytest.raises(UsageError, match=message):
            WeightSpec.parse(format, granularity, scale, "levels")
    with pytest.raises(UsageError, match="in whole groups of 16, not 40"):
        quantize(matrix_of(columns=40), SPEC)


def test_gptq_on_levels_has_less_output_error_than_nearest():
    matrix, moments = matrix_of(32), inputs("outliers")
    spec = WeightSpec.parse("lut4", "group:16", "lean", "levels")
    factors = gptq.factorize([moments], gptq.Options())
    grid = fit_lean(matrix, spec, (32, 96), factors)

    def error(values):
        lost = (values - matrix).double()
        return ((lost @ moments.double()) * lost).sum()

    assert error(grid.solution) < 0.5 * error(quantize(matrix, SPEC).dequantize())
    assert torch.equal(QuantizedTensor.of(grid, grid.solution).dequantize(), grid.solution)
