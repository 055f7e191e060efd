"""Branches and codes that are fitted to each other in turn: what each turn solves, and what the turns gain."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.errors import UsageError
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from dmquant.transforms import alternate, chains, create, fit_of

LAYERS = {
    "linear": lambda: nn.Linear(96, 48),
    "more rows than columns": lambda: nn.Linear(32, 128),
    "conv": lambda: nn.Conv2d(16, 24, 3),
    "pointwise": lambda: nn.Conv2d(40, 24, 1),
}


def branch_of(layer, **options):
    return create([("lowrank", options)], layer, None)


def lost(layer, format="fp4", granularity="group:16", **options):
    """The share of a weight that its codes and its branch together lose, squared."""
    spec = WeightSpec.parse(format, granularity, "mse")
    weight = layer.weight.detach().float()
    quantized = quantize_layer(layer, spec, None, transforms=branch_of(layer, **options))
    return ((quantized.float_weight() - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.parametrize("format", ["fp4", "int4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_turns_take_a_quarter_off_what_the_svd_alone_leaves(kind, format):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    assert lost(layer, format, rank=4, iterations=10) < 0.75 * lost(layer, format, rank=4, iterations=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_more_turns_are_never_worse(kind, granularity):
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    errors = [lost(layer, "fp6", granularity, rank=3, iterations=turns) for turns in (0, 1, 2, 5)]
    assert errors == sorted(errors, reverse=True)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_a_turn_gives_the_branch_of_least_error_under_any_moments(rows, columns, rank, seed):
    """Against numpy: with H = L L^T, the best of this rank for E is that of E L, L taken out again (Eckart-Young)."""
    generator = np.random.default_rng(seed)
    root = np.linalg.cholesky(np.eye(columns) + (half := generator.normal(size=(columns, columns))) @ half.T)
    left = generator.normal(size=(rows, columns))
    (branch,) = branch_of(nn.Linear(columns, rows), rank=rank)
    as_tensor = torch.from_numpy(left).float()
    parts = fit_of(branch).refit(branch, as_tensor, as_tensor @ torch.from_numpy(root).float())
    found = (parts["up"].double() @ parts["down"].double()).numpy()
    values = np.linalg.svd(left @ root, compute_uv=False)
    least = np.square(values[rank:]).sum()
    error = np.square((left - found) @ root).sum()
    assert least * (1 - 1e-3) - 1e-6 <= error <= least + 1e-3 * np.square(values).sum()  # up and down are of 16 bits


@pytest.mark.parametrize("kind", LAYERS)
def test_branch_and_rest_are_the_weight(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    weight, transforms = layer.weight.detach(), branch_of(layer, rank=4)
    parts, rest = next(chains(transforms, weight, None))
    parts, rest = alternate(transforms, parts, rest, lambda left: (left * 50).round() / 50)
    assert (transforms[0].undo(rest, parts["lowrank"]) - weight).norm() <= 1e-6 * weight.norm()


def test_what_does_not_alternate_stays_as_it_was():
    layer = nn.Linear(16, 16)
    for settings_ in ([("rotate", {})], [("lowrank", {"iterations": 0})], [("lowrank", {"of": "error"})]):
        transforms = create(settings_, layer, None)
        parts, rest = next(chains(transforms, layer.weight.detach(), None))
        again, same = alternate(transforms, parts, rest, torch.zeros_like)
        assert again is parts
        assert same is rest


def test_the_first_of_equals_is_kept_where_codes_lose_nothing():
    layer = nn.Linear(16, 16)
    transforms = branch_of(layer, rank=2)
    parts, rest = next(chains(transforms, layer.weight.detach(), None))
    again, same = alternate(transforms, parts, rest, lambda left: left)
    assert again["lowrank"] is parts["lowrank"]
    assert torch.equal(same, rest)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_weights_without_directions_work(fill):
    layer = nn.Linear(32, 16)
    layer.weight.data.fill_(fill)
    quantized = quantize_layer(layer, WeightSpec.parse("fp4"), None, transforms=branch_of(layer, rank=16))
    assert torch.allclose(quantized.float_weight(), layer.weight, atol=1e-2)


def test_a_layer_in_bf16_gets_a_branch():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).bfloat16()
    assert lost(layer, rank=4) < 0.8 * lost(layer, rank=4, iterations=0)


@pytest.mark.parametrize("option", ["iterations: 3", "by: output"])
def test_a_branch_of_the_error_has_no_turns(tmp_path, option):
    path = tmp_path / "x.yaml"
    path.write_text(f"name: x\ntransforms: [{{method: lowrank, of: error, {option}}}]\n")
    with pytest.raises(UsageError, match=f"transforms.0: `of: error` takes no {option.split(':')[0]}: such"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("options", "calibrated"), [({}, False), ({"by": "output"}, True), ({"by": "output", "iterations": 0}, False)]
)
def test_only_what_outputs_see_takes_data(options, calibrated):
    assert Recipe(name="x", transforms=[{"method": "lowrank", **options}]).calibrated == calibrated
