"""A format's values times scales: all that a grid offers says the same of a weight as its codes do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.grids import ScaledGrid
from dmquant.qtensor import QuantizedTensor, WeightSpec, quantize
from dmquant.scaling import to_matrix
from dmquant.stores import STORES


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    channels=st.integers(2, 40),
    kernel=st.sampled_from([(), (1, 1), (3, 2)]),
    format=st.sampled_from(["fp4", "fp4_e3m0", "fp6", "fp8_e5m2", "int3", "lut4", "nl4"]),
    granularity=st.sampled_from(["tensor", "channel", "group:16", "group:7"]),
    store=st.sampled_from(sorted(STORES)),
    split=st.none() | st.just(1),
    seed=st.integers(0, 1000),
)
def test_a_grid_and_the_codes_on_it_agree(rows, channels, kernel, format, granularity, store, split, seed):
    weight = torch.randn(rows, channels, *kernel, generator=torch.Generator().manual_seed(seed))
    spec = WeightSpec.parse(format, granularity, "mse", store, split)
    quantized, matrix = quantize(weight, spec), to_matrix(weight, split)
    grid = ScaledGrid(matrix, spec, quantized.scales, tuple(weight.shape))
    assert grid.scales.stored.shape == spec.scale_shape(tuple(weight.shape))
    assert torch.equal(grid.as_weight(grid.nearest), quantized.dequantize())
    assert torch.equal(QuantizedTensor.of(grid, grid.nearest).dequantize(), quantized.dequantize())  # 0 has two codes
    lower, upper = grid.neighbours
    assert ((grid.nearest == lower) | (grid.nearest == upper)).all()
    assert (lower <= upper).all()
    assert (grid.step >= upper - lower).logical_or(torch.isclose(grid.step, upper - lower)).all()
    column = seed % matrix.shape[1]
    assert torch.equal(grid.round_column(matrix[:, column], column), grid.nearest[:, column])
