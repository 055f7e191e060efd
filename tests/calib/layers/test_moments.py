"""Second moments of inputs: what they say of an output's error, and the scales and formats chosen by it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmquant.calib.layers import moments as module
from dmquant.calib.layers.hessian import fit_hessian
from dmquant.calib.layers.moments import POSITIONS, Moments, columns_of, fit_grid
from dmquant.convert import LayerPlan
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.qtensor import WeightSpec, to_matrix
from dmquant.scaling import fit_mse, to_groups

CPU = torch.device("cpu")
GRANULARITIES = ["tensor", "channel", "group:16", "group:64"]


def correlated(tokens=500, columns=40, seed=0):
    """Inputs of a few strong directions, with channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, columns, generator=generator)
    x = torch.randn(tokens, 6, generator=generator) @ mixing + 0.2 * torch.randn(tokens, columns, generator=generator)
    return x * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def weight(rows=24, columns=40, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments_of(x, spec, parts=3, shape=None):
    collected = Moments(shape or (1, x.shape[1]), spec, CPU)
    for part in x.chunk(parts):
        collected.add(part)
    return collected


def spec_of(format="fp4", granularity="group:16", scale="hessian", store="bf16"):
    return WeightSpec.parse(format, granularity, scale, store)


@pytest.mark.parametrize("size", [8, 16, 40, 64])
def test_moments_inside_groups_are_those_of_a_plain_sum(size):
    x, spec = correlated(), spec_of(granularity=f"group:{size}")
    inside = moments_of(x, spec).inside_groups(spec, (24, 40))
    full = x.T.double() @ x.double() / len(x)
    assert inside.shape == (-(-40 // size), size, size)
    for group, found in enumerate(inside):
        part = full[group * size : (group + 1) * size, group * size : (group + 1) * size]
        expected = F.pad(part, (0, size - len(part), 0, size - len(part)))
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_error_of_a_weight_is_that_of_the_outputs():
    x, error = correlated(), 0.1 * weight()
    expected = (x.double() @ error.double().T).square().sum(1).mean().item()
    assert moments_of(x, spec_of()).output_error(error) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("together", [None, 40, 23])
@pytest.mark.parametrize("strip", [1, 7, 16, 39])
def test_moments_added_up_strip_by_strip_are_whole(strip, together, monkeypatch):
    monkeypatch.setattr(module, "STRIP", strip)
    x, collected = correlated(), Moments((1, 40), spec_of(granularity="group:1"), CPU, together)
    first = 0
    for part in x.chunk(3):
        collected.add(part)
        collected.blocks()  # may be asked for in between
    for block in collected.blocks():
        own = x[:, first : first + len(block)].double()
        assert torch.allclose(block.double(), own.T @ own, rtol=1e-4, atol=1e-3)
        assert torch.equal(block, block.T)
        first += len(block)
    assert first == 40


def test_of_wide_layers_only_moments_inside_groups_are_kept(monkeypatch):
    x, error = correlated(), 0.1 * weight()
    whole = moments_of(x, spec_of())
    monkeypatch.setattr(module, "LARGEST", 39)
    parts = moments_of(x, spec_of())
    assert parts.sums.numel() == 3 * 16 * 16
    inside = [moments.inside_groups(spec_of(), (24, 40)) for moments in (parts, whole)]
    assert torch.allclose(*inside, rtol=1e-4, atol=1e-4)
    columns = [slice(start, start + 16) for start in (0, 16, 32)]
    expected = sum((x[:, part] @ error[:, part].T).square().sum(1).mean().item() for part in columns)
    assert parts.output_error(error) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("largest", [8192, 10])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_of_a_split_weight_the_moments_inside_groups_are_those_of_its_halves(granularity, largest, monkeypatch):
    """The first 7 of 10 channels, each with 6 positions of the kernel; columns are channels last."""
    monkeypatch.setattr(module, "LARGEST", largest)
    x, spec = correlated(columns=60), WeightSpec.parse("fp4", granularity, "hessian", split=7)
    inside = moments_of(x, spec, shape=(5, 10, 3, 2)).inside_groups(spec, (5, 10, 3, 2))
    channels_last = x.view(-1, 6, 10)
    for part in (channels_last[..., :7], channels_last[..., 7:]):
        half = part.flatten(1).double()
        for start in range(0, half.shape[1], spec.granularity.size or half.shape[1]):
            group = half[:, start : start + (spec.granularity.size or half.shape[1])]
            found, inside = inside[0], inside[1:]
            expected = torch.zeros(found.shape, dtype=torch.float64)
            expected[: group.shape[1], : group.shape[1]] = group.T @ group / len(group)
            assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert not len(inside)


@pytest.mark.parametrize("store", ["bf16", "fp32", "e8m0"])
@pytest.mark.parametrize("format", ["fp4", "fp6", "int4"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inputs_without_correlation_give_the_scales_of_least_weight_error(granularity, format, store):
    spec = spec_of(format, granularity, store=store)
    groups = to_groups(weight(), spec.granularity)
    size = spec.granularity.size or 40
    identity = torch.eye(size).expand(-(-40 // size), size, size)
    by_output = fit_hessian(groups, spec.fmt, store, identity)
    assert torch.equal(by_output.stored, fit_mse(groups, spec.fmt, store).stored)


@pytest.mark.parametrize("format", ["fp4", "fp4_e3m0", "fp6", "int4"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64"])
def test_scales_by_output_error_have_the_least_of_it(granularity, format):
    """With one scale a row or tensor the criterion is the output's error itself, so this is no matter of luck."""
    x, matrix = correlated(), weight()
    collected = moments_of(x, spec_of(granularity=granularity))

    def error(scale):
        plan = LayerPlan("layer", spec_of(format, granularity, scale), None)
        grid = fit_grid(matrix, plan, collected)
        return (x @ (grid.nearest - matrix).T).square().sum(1).mean().item()

    by_output = error("hessian")
    assert by_output <= error("absmax") * (1 + 1e-5)
    assert by_output <= error("mse") * (1 + 1e-5)


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_convolutions_scales_by_output_error_have_the_least_of_it(granularity, split):
    """Halves that are not correlated, so that their errors add up and the criterion is the output's error itself."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, bias=False).requires_grad_(False)
    noise = torch.randn(18, 8, 16, 16, generator=generator)  # no larger, so that every position counts
    x = F.avg_pool2d(noise, 3, 1, 1) * torch.logspace(-1, 1, 8).view(8, 1, 1)
    alone = [x * (torch.arange(8).view(8, 1, 1) < 5), x * (torch.arange(8).view(8, 1, 1) >= 5)] if split else [x]

    def error(scale):
        spec = WeightSpec.parse("fp4", granularity, scale, "fp32", split)
        collected = Moments(tuple(layer.weight.shape), spec, CPU)
        for part in alone:
            collected.add(columns_of(layer, part))
        grid = fit_grid(layer.weight, LayerPlan("conv", spec, None), collected)
        lost = grid.as_weight(grid.nearest) - layer.weight
        outputs = torch.cat([F.conv2d(part, lost, padding=1) for part in alone])
        measured = outputs.square().sum(1).mean().item()
        told = collected.output_error(to_matrix(lost, split))
        assert told == pytest.approx(measured, rel=1e-3)
        return measured

    by_output = error("hessian")
    assert by_output <= error("absmax") * (1 + 1e-4)
    assert by_output <= error("mse") * (1 + 1e-4)


def test_the_format_chosen_for_a_split_convolution_is_that_of_least_output_error():
    candidates = tuple(map(get_format, ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0")))
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, bias=False), torch.randn(4, 6, 12, 12, generator=generator).softmax(1)
    chosen = set()
    for outlier in (1, 8, 30):
        layer.weight.data = torch.randn(8, 6, 3, 3, generator=generator)
        layer.weight.data[:, ::4, 0, 0] = outlier
        spec = WeightSpec.parse("fp4", "channel", "absmax", split=4)
        collected = Moments((8, 6, 3, 3), spec, CPU)
        collected.add(columns_of(layer, x))

        def error(fmt, spec=spec):
            grid = fit_grid(layer.weight, LayerPlan("conv", replace(spec, fmt=fmt), None), None)
            return F.conv2d(x, grid.as_weight(grid.nearest) - layer.weight).square().mean().item()

        grid = fit_grid(layer.weight, LayerPlan("conv", spec, None, candidates=candidates), collected)
        assert grid.spec.fmt == min(candidates, key=error)
        chosen.add(grid.spec.fmt)
    assert len(chosen) > 1


def test_scales_of_groups_by_output_error_gain_where_inputs_are_correlated():
    x, matrix = correlated(), weight()
    collected = moments_of(x, spec_of())

    def error(scale):
        grid = fit_grid(matrix, LayerPlan("layer", spec_of(scale=scale), None), collected)
        return collected.output_error(grid.nearest - matrix)

    assert error("hessian") < 0.95 * error("mse")
    assert error("hessian") < 0.95 * error("absmax")


def test_the_format_of_least_output_error_is_chosen():
    x = correlated()
    candidates = tuple(map(get_format, ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0")))
    matrices = {
        "fp4_e1m2": torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "fp4_e3m0": weight().sign() * torch.exp2(-4 * torch.rand(24, 40, generator=torch.Generator().manual_seed(0))),
    }
    for expected, matrix in matrices.items():
        collected = moments_of(x, spec_of())
        plan = LayerPlan("layer", spec_of(scale="absmax"), None, candidates=candidates)
        alone = {
            fmt.name: collected.output_error(
                fit_grid(matrix, LayerPlan("layer", replace(plan.weights, fmt=fmt), None), None).nearest - matrix
            )
            for fmt in candidates
        }
        chosen = fit_grid(matrix, plan, collected)
        assert chosen.spec.fmt.name == min(alone, key=alone.get)
        if expected == "fp4_e1m2":  # evenly spread weights want evenly spread values
            assert chosen.spec.fmt.name == expected


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 0), "dilation": (2, 1)}])
def test_columns_of_a_convolution_are_what_its_weights_meet(geometry):
    layer, x = nn.Conv2d(3, 5, (3, 2), bias=False, **geometry), torch.randn(2, 3, 9, 8)
    output = layer(x)
    columns = columns_of(layer, x)
    assert columns.shape == (output.numel() // 5, 3 * 3 * 2)
    by_matrix = (columns @ to_matrix(layer.weight).T).view(2, -1, 5).transpose(1, 2).reshape(output.shape)
    assert torch.allclose(by_matrix, output, atol=1e-5)


def test_columns_of_a_linear_layer_are_its_tokens():
    x = torch.randn(2, 7, 3, 6)
    assert torch.equal(columns_of(nn.Linear(6, 4), x), x.view(42, 6))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "not for grouped convolutions: give them scale: mse"),
        (nn.Conv2d(4, 4, 3, padding="same"), "numeric zero padding: use scale: mse"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "numeric zero padding: use scale: mse"),
    ],
)
def test_convolutions_without_such_columns_are_refused_with_what_to_do(layer, message):
    with pytest.raises(UsageError, match=message):
        columns_of(layer, torch.randn(1, 4, 8, 8))


def test_of_large_inputs_the_same_few_positions_of_every_row_are_taken():
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    taken = columns_of(layer, x)
    assert taken.shape == (2 * POSITIONS, 27)
    assert torch.equal(taken, columns_of(layer, x))
    everywhere = F.unfold(x, 3, padding=1).unflatten(1, (3, 9)).transpose(1, 2).flatten(1, 2).transpose(1, 2)
    for row, all_of_row in zip(taken.chunk(2), everywhere, strict=True):
        assert len(row.unique(dim=0)) == POSITIONS
        assert (torch.cdist(row, all_of_row, compute_mode="donot_use_mm_for_euclid_dist").amin(1) == 0).all()
    tokens = torch.arange(2.0 * 300).view(2, 300, 1).expand(2, 300, 4)
    first, second = columns_of(nn.Linear(4, 4), tokens).chunk(2)
    assert len(first) == POSITIONS
    assert torch.equal(first + 300, second)
