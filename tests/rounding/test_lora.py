"""LoRA-Rounding: it starts at the float weights, moves by a matrix of low rank, and gains on correlated inputs."""

import pytest
import torch

from dmquant.rounding import get_method
from tests.calib.blocks.test_learn import ar, learned, low_rank, problem
from tests.rounding.test_rounding import FORMATS, grid_of

LORA = get_method("lora")


def lora(grid, **options):
    return LORA.start(grid, LORA.Options(**options))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(12, 40), (3, 40), (12, 2)])
def test_soft_weights_start_as_the_float_weights(format, shape):
    grid = grid_of(format, shape=shape)
    rounding = lora(grid)
    inside = grid.neighbours[1] > grid.neighbours[0]
    assert ((rounding() - grid.weight).abs() / grid.step)[inside].max() <= 2e-6
    rows, columns = shape
    assert sum(parameter.numel() for parameter in rounding.parameters()) == min(5, *shape) * (rows + columns)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_v_moves_within_its_rank_and_every_value_stays_a_neighbour(rank):
    grid = grid_of()
    rounding, begun = lora(grid, rank=rank), lora(grid).v.detach()
    generator = torch.Generator().manual_seed(1)
    rounding.second.data = 3 * torch.randn(rounding.second.shape, generator=generator)
    moved = (rounding.v - begun).detach()
    assert torch.linalg.matrix_rank(moved, rtol=1e-5) == rank
    hard, (lower, upper) = rounding.hard(), grid.neighbours
    assert ((hard == lower) | (hard == upper)).all()
    assert not torch.equal(hard, lora(grid).hard())


def test_the_penalty_is_that_of_adaround():
    grid, full = grid_of(), get_method("adaround")
    rounding, other = lora(grid, regularizer=7.0), full.start(grid, full.Options(regularizer=7.0))
    assert rounding.penalty(0.1) is None
    assert rounding.penalty(0.6).item() == pytest.approx(other.penalty(0.6).item(), rel=1e-5)


def test_a_large_penalty_throws_all_weights_to_a_few_patterns_and_nearest_is_kept():
    done, _ = learned(problem(ar, method="lora", regularizer=100.0), iterations=60)
    assert done.undecided < 0.1
    assert done.error == done.nearest_error


@pytest.mark.parametrize(("rank", "left"), [(5, 0.75), (16, 0.5)])
@pytest.mark.parametrize("inputs", [ar, low_rank])
def test_on_correlated_inputs_it_gains_with_a_fraction_of_the_numbers(inputs, rank, left):
    """Held out, 0.60 and 0.55 of the error of nearest rounding is left, or 0.37 and 0.31; by AdaRound 0.23 and 0.20."""
    case = problem(inputs, method="lora", rank=rank)
    done, _ = learned(case, iterations=200)
    assert sum(parameter.numel() for parameter in case[0].rounding.parameters()) == rank * (96 + 64)
    assert done.error <= left * done.nearest_error
