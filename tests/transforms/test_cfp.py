"""Coarse-to-fine outliers: which are found, what is cut off and scaled, and where cutting off is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.errors import UsageError
from dmquant.recipe import Recipe
from dmquant.transforms import InputStatistics, create, fit_of
from dmquant.transforms.cfp import Options, largest_kept

PLANTED = torch.tensor([40.0, -41.0, 43.0])


def normal(count=5000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_planted_outliers_are_found_exactly_once_and_at_any_scale(seed):
    x = normal(seed=seed)
    x[[3, 700, 4999]] = PLANTED
    limit = largest_kept(x, Options())
    assert (x.abs() > limit).sum() == 3
    assert limit == x.abs().sort().values[-4]
    assert largest_kept(x * 2**-9, Options()) == limit * 2**-9
    cut = x.clamp(-limit, limit)
    assert largest_kept(cut, Options()) == limit  # nothing is left to cut


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 400), seed=st.integers(0, 1000), width=st.floats(1e-3, 1e3))
def test_clean_values_have_none(count, seed, width):
    x = width * (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1)
    limit = largest_kept(x, Options())
    if count >= 20:  # of fewer, quartiles say little
        assert limit == x.abs().max()
    assert largest_kept(x.clamp(-limit, limit), Options()) == limit
    assert largest_kept(torch.full((count,), width), Options()) == torch.tensor(width)


def test_two_kinds_of_outliers_are_all_cut_off_at_once():
    """The largest gap is above the nearer kind; the lowest that sets values apart is below it."""
    x = torch.cat([normal(), torch.full((4,), 40.0), torch.full((2,), 140.0)])
    assert largest_kept(x, Options()) == normal().abs().max()


def layer_and_inputs(kind):
    torch.manual_seed(0)
    layer = nn.Linear(40, 12) if kind == "linear" else nn.Conv2d(40, 12, 3)
    x = torch.randn(2, 40, 6, 6) if kind == "conv" else torch.randn(2, 9, 40)
    dim = 1 if kind == "conv" else -1
    x.select(dim, 7).mul_(30)
    x.select(dim, 20).mul_(50)
    return layer.requires_grad_(False), x, dim


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_outlying_channels_are_scaled_by_the_root_and_the_function_stays(kind):
    layer, x, dim = layer_and_inputs(kind)
    (transform,) = create([("cfp", {"weights": False})], layer, None)
    absmax = x.abs().movedim(dim, -1).flatten(0, -2).amax(0)
    none, parts = fit_of(transform).candidates(transform, layer.weight, InputStatistics(absmax[None], [x]))
    assert (none["factor"] == 1).all()
    factor = parts["factor"].float().flatten()
    assert (factor != 1).nonzero().flatten().tolist() == [7, 20]
    kept = absmax[(factor == 1)].max()
    assert torch.allclose(factor[[7, 20]], (kept / absmax[[7, 20]]).sqrt(), rtol=2**-8)
    scaled = transform.input(x, parts, -1 if kind == "linear" else -3)
    weight = transform.to_quantize(layer.weight, parts)
    other = type(layer)(40, 12, *layer.weight.shape[2:3])
    other.load_state_dict({"weight": weight, "bias": layer.bias})
    assert (other(scaled) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    assert torch.allclose(transform.undo(weight, parts), layer.weight, rtol=1e-6)


def test_the_weight_is_cut_off_only_where_that_is_asked_for():
    layer, *_ = layer_and_inputs("linear")
    layer.weight[2, 3], layer.weight[5, 6] = 9.0, -8.0
    for cuts in (True, False):
        (transform,) = create([("cfp", {"weights": cuts})], layer, None)
        (parts,) = fit_of(transform).candidates(transform, layer.weight, None)
        changed = transform.to_quantize(layer.weight, parts) != layer.weight
        assert changed.nonzero().tolist() == ([[2, 3], [5, 6]] if cuts else [])


def test_cutting_off_is_refused_where_nothing_learns_it_back():
    learned = Recipe.load("adaround").with_settings(transforms=["cfp"])
    assert learned.calibrated
    with pytest.raises(UsageError, match="cfp loses what only a rounding that learns") as refused:
        Recipe.load("gptq").with_settings(transforms=["cfp"])
    assert "\n" not in str(refused.value)
    Recipe.load("gptq").with_settings(transforms=[{"method": "cfp", "weights": False}])
