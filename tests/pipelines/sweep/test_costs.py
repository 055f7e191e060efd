"""Costs of a quantized model's arithmetic: against values counted by hand."""

import itertools

import pytest
import torch
from torch import nn

from dmquant.convert import plan
from dmquant.formats import get_format
from dmquant.pipelines.sweep.costs import accumulator_cells, bits_of, counting, fans_in, model_costs, multiplier_cells
from dmquant.recipe import Recipe


class Small(nn.Module):
    """A convolution of 8x8 pixels with stride 2, then a linear layer that is called twice, then one that never is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x):
        flat = self.conv(x).flatten(2)
        return self.linear(self.linear(flat))


CONV = 2 * 8 * 4 * 4 * (2 * 3 * 3)  # images, channels, pixels; inputs of one output
LINEAR = 2 * (2 * 8) * 16 * 16  # calls, rows, outputs, inputs


@pytest.fixture
def counted():
    module = Small()
    with counting(module) as counts:
        module(torch.zeros(2, 4, 8, 8))
    module(torch.zeros(2, 4, 8, 8))  # after the block nothing is counted
    return module, counts


def costs(counted, **settings):
    module, counts = counted
    recipe = Recipe.load("rtn").with_settings(granularity="channel", keep="none", **settings)
    return model_costs(plan(module, recipe), counts, fans_in(module))


def test_multiply_accumulates_are_outputs_times_the_inputs_of_one(counted):
    assert counted[1] == {"conv": CONV, "linear": LINEAR}


@pytest.mark.parametrize(
    ("weights", "activations", "bits"), [("fp4", "fp6", 4 * 6), ("int3", "int8", 3 * 8), ("fp4", "none", 4 * 16)]
)
def test_bit_operations_are_weight_bits_times_activation_bits(counted, weights, activations, bits):
    found = costs(counted, weights=weights, activations=activations)
    assert found.multiply_accumulates == CONV + LINEAR
    assert found.bit_operations == bits * (CONV + LINEAR)


def test_layers_of_other_formats_and_kept_ones_count_as_what_they_are(counted):
    module, counts = counted
    recipe = Recipe.load("rtn").with_settings(
        weights="int4",
        activations="int8",
        granularity="channel",
        rules=[{"match": "linear", "weights": "int8"}, {"match": "conv", "keep": True}],
    )
    found = model_costs(plan(module, recipe), counts, fans_in(module))
    assert (found.multiply_accumulates, found.bit_operations) == (LINEAR, 64 * LINEAR)
    assert (found.multiplier_cells, found.accumulator_cells) == (64, 1 + 19)  # 16 products of 2^14 at most are 2^18


@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_branch_counts_with_16_bits(rank):
    """A product of the input with the left factor for each position, and one of the right factor for each output."""
    module = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 24))
    with counting(module) as counts:
        module(torch.zeros(2, 4, 8, 8))
    found = []
    for transforms in ([], [{"method": "lowrank", "rank": rank}]):
        recipe = Recipe.load("rtn").with_settings(granularity="channel", keep="none", transforms=transforms)
        found.append(model_costs(plan(module, recipe), counts, fans_in(module)))
    conv, linear = 2 * 4 * 4 * (4 * 9 + 8), 2 * 8 * (16 + 24)
    assert found[1].bit_operations - found[0].bit_operations == rank * (conv + linear) * 16 * 16
    assert found[1].multiply_accumulates == found[0].multiply_accumulates
    assert found[1].area == found[0].area


def test_area_is_the_mean_over_multiply_accumulates(counted):
    found = costs(counted, weights="fp4_e2m1", activations="fp6_e2m3")
    assert found.multiplier_cells == 2 * 4 + 2
    # e2m1 reaches 6 in steps of 1/2, e2m3 7.5 in steps of 1/8: 12 * 60 = 720; 18 and 16 of those need 14 bits and sign
    assert (18 * 720).bit_length() == (16 * 720).bit_length() == 14
    assert found.accumulator_cells == 15
    assert found.area == 25


@pytest.mark.parametrize(("weights", "activations"), [("fp4", "none"), ("lut4", "fp8")])
def test_without_low_bits_on_both_sides_there_is_no_area(counted, weights, activations):
    found = costs(counted, weights=weights, activations=activations)
    assert (found.multiplier_cells, found.accumulator_cells, found.area) == (None, None, None)


@pytest.mark.parametrize(
    ("weights", "activations", "cells"),
    [
        ("int4", "int8", 32),
        ("fp8_e4m3", "fp8_e5m2", 4 * 3 + 5),
        ("fp4_e3m0", "fp4_e3m0", 1 + 3),
        ("fp4_e2m1", "int8", 2 * 8),
        ("int3", "fp6_e3m2", 3 * 3),
    ],
)
def test_cells_of_a_multiplier(weights, activations, cells):
    assert multiplier_cells(get_format(weights), get_format(activations)) == cells


@pytest.mark.parametrize(("weights", "activations"), [("fp4_e2m1", "fp4_e3m0"), ("int3", "int4"), ("fp3_e1m1", "int2")])
@pytest.mark.parametrize("terms", [1, 3])
def test_the_accumulator_is_as_wide_as_the_largest_sum_needs(weights, activations, terms):
    w, a = get_format(weights), get_format(activations)
    products = {
        x * y / (w.min_positive * a.min_positive) for x, y in itertools.product(w.values.tolist(), a.values.tolist())
    }
    assert all(product == int(product) for product in products)
    largest = int(terms * max(abs(product) for product in products))
    cells = accumulator_cells(w, a, terms)
    assert largest <= 2 ** (cells - 1) - 1  # two's complement
    assert largest > 2 ** (cells - 2) - 1


def test_an_operand_that_is_left_alone_has_16_bits():
    assert bits_of(None) == 16
    assert bits_of(get_format("fp6")) == 6
