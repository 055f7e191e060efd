"""Transforms leave a layer's function as it is, store what they say, and help where they claim to."""

import copy
import math

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec, TimestepRanges
from dmquant.convert import plan, quantize_
from dmquant.errors import UsageError
from dmquant.layers import QUANTIZED, quantize_layer
from dmquant.pipelines.runs.footprint import footprint
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.recipe import Recipe
from dmquant.transforms import (
    InputStatistics,
    Residuals,
    chains,
    correction_of,
    create,
    fit_of,
    get_method,
    method_names,
)
from dmquant.transforms.rotate import hadamard, regular_hadamard

FP4, FP6 = WeightSpec.parse("fp4", "group:16"), ActivationSpec.parse("fp6")
LAYERS = {
    "linear": lambda: nn.Linear(48, 24),
    "linear without bias": lambda: nn.Linear(48, 24, bias=False),
    "one row": lambda: nn.Linear(40, 1),
    "odd": lambda: nn.Linear(7, 5),
    "conv": lambda: nn.Conv2d(16, 12, 3, padding=1),
    "strided": lambda: nn.Conv2d(16, 12, 3, stride=2, padding=1, bias=False),
    "circular": lambda: nn.Conv2d(16, 12, (3, 1), padding=(1, 0), padding_mode="circular"),
    "dilated": lambda: nn.Conv2d(16, 12, 3, dilation=2, padding="same"),
    "pointwise": lambda: nn.Conv2d(16, 12, 1),
}
SETTINGS = {
    "smooth": [("smooth", {})],
    "lowrank": [("lowrank", {"rank": 3})],
    "lqer": [("lowrank", {"rank": 3, "of": "error"})],
    "outliers": [("outliers", {"share": 0.02})],
    "all outliers": [("outliers", {"share": 1})],
    "rotate": [("rotate", {})],
    "bias": [("bias", {})],
    "equalize": [("equalize", {})],
    "all": [("bias", {}), ("lowrank", {"rank": 4}), ("outliers", {}), ("rotate", {"size": 8}), ("smooth", {})],
}


def made(kind, seed=0):
    torch.manual_seed(seed)
    return LAYERS[kind]()


def inputs(layer, rows=4, seed=1):
    """With channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    channels = layer.weight.shape[1]
    x = torch.randn(rows, 9, channels, generator=generator) * torch.logspace(-1, 1, channels)
    return x if isinstance(layer, nn.Linear) else x.unflatten(1, (3, 3)).movedim(-1, 1)


def statistics_of(layer, x):
    dim = -1 if isinstance(layer, nn.Linear) else 1
    return InputStatistics(x.movedim(dim, -1).flatten(0, -2).abs().amax(0, keepdim=True), [x])


def quantized_as(layer, settings, parts_of=lambda chains: chains[-1], split=None, activations=None, statistics=None):
    """A quantized layer, and the float weight that it would quantize."""
    spec = WeightSpec.parse("fp4", "group:16", split=split)
    transforms = create(settings, layer, split)
    quantized = QUANTIZED[type(layer)].like(layer, spec, activations, "meta", transforms)
    parts, weight = parts_of(list(chains(transforms, layer.weight.detach(), statistics)))
    quantized.load_parts(parts)
    bias = None if layer.bias is None else layer.bias.detach()
    quantized.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return quantized, weight


def with_exact_weight(quantized, weight):
    """The layer as if its codes stood for exactly `weight`."""
    quantized.dequantize = lambda dtype: quantized.complete(weight).to(dtype)
    return quantized


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", LAYERS)
def test_without_quantization_the_function_stays(kind, settings):
    layer = made(kind)
    x = inputs(layer)
    quantized, weight = quantized_as(layer, settings, statistics=statistics_of(layer, x))
    exact = with_exact_weight(quantized, weight)
    expected = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        output = exact(x).double()
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    assert (exact.float_weight() - layer.weight).norm() <= 1e-6 * layer.weight.norm()


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise"])
@pytest.mark.parametrize("split", [4, 7, 8])
def test_without_quantization_the_function_of_a_split_input_stays(kind, split):
    layer = made(kind)
    x = inputs(layer)
    quantized, weight = quantized_as(layer, SETTINGS["all"], statistics=statistics_of(layer, x), split=split)
    with torch.no_grad():
        output, expected = with_exact_weight(quantized, weight)(x), layer(x)
    assert (output - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["outliers", "rotate", "bias"])
def test_grouped_convolutions_stay_where_a_method_takes_them(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3, groups=4)
    x = torch.randn(2, 16, 6, 6)
    quantized, weight = quantized_as(layer, [(name, {})])
    with torch.no_grad():
        output, expected = with_exact_weight(quantized, weight)(x), layer(x)
    assert (output - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["smooth", "lowrank", "subspace"])
def test_grouped_convolutions_are_refused_with_the_layers_name_where_it_does_not(name):
    model = nn.Sequential(nn.Conv2d(16, 8, 3, groups=4))
    with pytest.raises(UsageError, match=f"layer 0: transform {name} is not for grouped convolutions"):
        plan(model, Recipe(name="x", transforms=[name]))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", ["linear", "conv", "odd"])
def test_the_parts_are_those_that_the_shape_implies_and_fill_an_empty_layer(kind, settings):
    layer = made(kind)
    transforms = create(settings, layer, None)
    quantized = quantize_layer(layer, FP4, FP6, transforms=transforms)
    for transform in transforms:
        stored = quantized.parts(transform)
        assert {name: (tuple(part.shape), part.dtype) for name, part in stored.items()} == {
            name: (part.shape, part.dtype) for name, part in transform.parts().items()
        }
    empty = QUANTIZED[type(layer)].like(layer, FP4, FP6, "meta", transforms)
    empty.load_state_dict(quantized.half().float().state_dict(), assign=True)
    quantized = quantize_layer(layer, FP4, FP6, transforms=transforms)
    if layer.bias is not None:
        empty.bias = quantized.bias
    x = inputs(layer)
    assert torch.equal(empty(x), quantized(x))
    assert all(parameter.dtype == torch.uint8 for name, parameter in empty.named_parameters() if name != "bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_compute_in_16_bits(dtype):
    layer = made("conv").to(dtype)
    quantized = quantize_layer(layer, WeightSpec.parse("fp8"), None, transforms=create(SETTINGS["all"], layer, None))
    x = torch.randn(2, 16, 6, 6).to(dtype)
    assert quantized(x).dtype == dtype
    assert (quantized(x) - layer(x)).norm() <= 0.05 * layer(x).norm()


def test_what_they_store_counts_in_the_bits_per_weight():
    model = nn.Sequential(nn.Linear(64, 32))
    recipe = Recipe(name="x", granularity="group:64", transforms=[{"method": "lowrank", "rank": 2}, "outliers"])
    quantize_(model, recipe)
    outliers = math.ceil(0.005 * 64 * 32)
    low_rank = 2 * 2 * (64 + 32)
    assert footprint(model).quantized_bytes == 64 * 32 // 2 + 32 * 2 + low_rank + 2 * 32 + (2 + 2) * outliers


def test_transforms_apply_in_their_own_order_whatever_the_recipe_says():
    layer = made("linear")
    names = [one.name for one in create([(name, {}) for name in reversed(method_names())], layer, None)]
    assert names == ["equalize", "subspace", "cfp", "smooth", "rotate", "outliers", "lowrank", "bias"]


class TestRecipe:
    """What a recipe may say of transforms."""

    def test_rules_replace_them_and_data_makes_it_calibrated(self):
        recipe = Recipe(name="x", transforms=["rotate"], rules=[{"match": "a", "transforms": []}])
        assert not recipe.calibrated
        assert recipe.settings_by_layer(["a"])["a"].transforms == []
        assert [one.method for one in recipe.settings_by_layer(["b"])["b"].transforms] == ["rotate"]
        for transform in ("smooth", "bias", {"method": "lowrank", "of": "error"}):
            assert Recipe(name="x", rules=[{"match": "a", "transforms": [transform]}]).calibrated

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("transforms: [smoth]", "unknown transform 'smoth': did you mean 'smooth'"),
            ("transforms: [{method: lowrank, ranks: 3}]", "unknown key 'ranks': did you mean 'rank'"),
            ("transforms: [{method: rotate, size: 48}]", "a power of two channels, not 48"),
            ("transforms: [rotate, {method: rotate, size: 8}]", "transform rotate is named twice"),
            ("transforms: [{method: smooth, ranges: 0}]", "greater than or equal to 1"),
            ("transforms: [{method: smooth, ranges: 2.5}]", "valid integer"),
            ("transforms: [{method: smooth, fold: 3}]", "valid boolean"),
            (
                "transforms: [smooth]\nactivation_scale: static:2\nactivation_granularity: tensor",
                "transform smooth changes the input that is quantized, and static activation scales",
            ),
            (
                "activations: fp6\nactivation_granularity: tensor\n"
                "rules: [{match: a, activation_scale: 'static:1', transforms: [rotate]}]",
                "transform rotate changes the input that is quantized",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_when_it_loads(self, text, message, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(f"name: x\n{text}\n")
        with pytest.raises(UsageError, match=message) as caught:
            Recipe.load(path)
        assert "\n" not in str(caught.value)

    def test_it_round_trips(self, tmp_path):
        recipe = Recipe(
            name="x",
            transforms=["equalize", {"method": "smooth", "ranges": 4}, {"method": "lowrank", "rank": 8}],
        )
        recipe.save(tmp_path / "x.yaml")
        assert Recipe.load(tmp_path / "x.yaml") == recipe
        assert Recipe.model_validate(recipe.to_dict()) == recipe


class TestSmooth:
    """SmoothQuant."""

    def candidates(self, layer, x, alpha):
        (transform,) = create([("smooth", {"alpha": alpha})], layer, None)
        found = fit_of(transform).candidates(transform, layer.weight, statistics_of(layer, x))
        return [parts["factor"].float().flatten() for parts in found]

    def test_the_ends_of_alpha_level_the_weight_or_the_input(self):
        layer = made("linear")
        x = inputs(layer)
        _, weight_levelled, input_levelled = self.candidates(layer, x, [0.0, 1.0])
        assert torch.allclose((layer.weight / weight_levelled).abs().amax(0), torch.ones(48), rtol=5e-3)
        assert torch.allclose((x * input_levelled).abs().amax((0, 1)), torch.ones(48), rtol=5e-3)

    def test_channels_without_range_are_left_alone(self):
        layer = made("conv")
        layer.weight.data[:, 3] = 0
        x = inputs(layer)
        x[:, 5] = 0
        for factor in self.candidates(layer, x, [0.0, 0.5, 0.9]):
            assert factor[3] == 1
            assert factor[5] == 1
            assert factor.isfinite().all()

    def test_with_ranges_the_maxima_are_those_of_all_of_each_and_their_geometric_mean(self):
        layer = nn.Linear(4, 3)
        weight = layer.weight.detach()
        absmax = torch.tensor([[1.0, 64.0, 1.0, 4.0], [4.0, 1.0, 1.0, 0.0]])
        (transform,) = create([("smooth", {"alpha": [0.0, 0.5], "ranges": 2})], layer, None)
        assert transform.timestep_ranges == 1  # nothing that the layer stores or computes differs by timestep
        assert fit_of(transform).statistics == 2
        found = [
            parts["factor"] for parts in fit_of(transform).candidates(transform, weight, InputStatistics(absmax, []))
        ]
        column = weight.abs().amax(0)

        def factor(alpha, x):
            x = torch.tensor(x)
            return torch.where(x > 0, column ** (1 - alpha) / x**alpha, 1.0).bfloat16().view(1, 4)

        overall, first, second, mean = (
            [4.0, 64.0, 1.0, 4.0],
            [1.0, 64.0, 1.0, 4.0],
            [4.0, 1.0, 1.0, 0.0],
            [2.0, 8.0, 1.0, 4.0],
        )
        expected = [
            torch.ones(1, 4).bfloat16(),
            factor(0.0, overall),
            factor(0.5, overall),
            factor(0.5, first),  # at alpha 0 the same as overall
            factor(0.0, second),  # its last channel is left alone
            factor(0.5, second),
            factor(0.5, mean),
        ]
        assert len(found) == len(expected)
        assert all(
            torch.allclose(one.float(), other.float(), rtol=2**-7) for one, other in zip(found, expected, strict=True)
        )
        assert len({tuple(one.flatten().tolist()) for one in found}) == len(found)

    def test_ranges_that_are_all_alike_add_no_candidates(self):
        layer = made("linear")
        alone = statistics_of(layer, inputs(layer))
        alike = InputStatistics(alone.absmax.bfloat16().float().expand(3, -1), alone.sample)
        (one,), (three,) = (create([("smooth", {"ranges": ranges})], layer, None) for ranges in (1, 3))
        weight = layer.weight.detach()
        assert len(fit_of(one).candidates(one, weight, alone)) == 11
        found = fit_of(three).candidates(three, weight, alike)
        assert len(found) < 2 * 11  # but for the rounding of the mean
        expected = fit_of(one).candidates(one, weight, InputStatistics(alike.absmax[:1], alone.sample))
        assert all(torch.equal(a["factor"], b["factor"]) for a, b in zip(found, expected, strict=False))

    def test_outlier_channels_quantize_better_per_tensor(self):
        """methods.md section 9: INT8 at alpha 1/2 with two channels sixty times as large."""
        torch.manual_seed(0)
        layer = nn.Linear(64, 32, bias=False)
        x = torch.randn(256, 64)
        x[:, [5, 40]] *= 60
        int8, per_tensor = WeightSpec.parse("int8", "channel"), ActivationSpec.parse("int8", "tensor")
        plain = quantize_layer(layer, int8, per_tensor)
        settings = [("smooth", {"alpha": [0.5]})]
        smooth, weight = quantized_as(layer, settings, statistics=statistics_of(layer, x), activations=per_tensor)
        with_exact_weight(smooth, quantize_tensor(weight, "int8", "channel").dequantize())
        with torch.no_grad():
            errors = [(one(x) - layer(x)).square().mean() for one in (plain, smooth)]
        assert errors[1] <= 0.2 * errors[0]


class TestLowRank:
    """SVDQuant's and LQER's branches."""

    @pytest.mark.parametrize("kind", ["linear", "conv"])
    def test_the_branch_of_the_weight_is_its_best_approximation(self, kind):
        layer = made(kind)
        (transform,) = create([("lowrank", {"rank": 5})], layer, None)
        (parts,) = fit_of(transform).candidates(transform, layer.weight.detach(), None)
        rest = transform.to_quantize(layer.weight.detach(), parts)
        values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
        assert rest.square().sum() == pytest.approx(values[5:].square().sum().item(), rel=1e-3)

    def test_a_weight_of_few_directions_loses_almost_nothing(self):
        torch.manual_seed(0)
        layer = nn.Linear(64, 48)
        layer.weight.data = torch.randn(48, 4) @ torch.randn(4, 64) + 0.01 * torch.randn(48, 64)
        plain = quantize_layer(layer, FP4, None)
        branched = quantize_layer(layer, FP4, None, transforms=create([("lowrank", {"rank": 4})], layer, None))
        errors = [(one.float_weight() - layer.weight).square().sum() for one in (plain, branched)]
        assert errors[1] < 0.01 * errors[0]

    def test_the_branch_takes_the_input_before_it_is_quantized(self):
        layer = made("linear")
        transforms = create([("lowrank", {"rank": 24})], layer, None)  # full rank: nothing is left for the codes
        coarse = quantize_layer(layer, FP4, ActivationSpec.parse("int2"), transforms=transforms)
        x = inputs(layer)
        with torch.no_grad():
            assert (coarse(x) - layer(x)).norm() < 0.02 * layer(x).norm()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(("kind", "shape"), [("linear", (48,)), ("linear", (2, 5, 48)), ("conv", (2, 16, 6, 6))])
    def test_the_branch_is_added_whatever_the_shape_and_its_gradient_is_that_of_the_sum(
        self, kind, shape, memory_format
    ):
        layer = made(kind)
        transforms = create([("lowrank", {"rank": 3})], layer, None)
        branched = quantize_layer(layer, FP4, None, transforms=transforms)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=memory_format) if kind == "conv" else x
        twin = copy.deepcopy(layer).requires_grad_(False)
        twin.weight.data = branched.float_weight()
        results = []
        for one in (branched, twin):
            given = x.clone().requires_grad_()
            output = one(given)
            output.square().sum().backward()
            results.append((output.detach(), given.grad))
        for ours, expected in zip(*results, strict=True):
            assert (ours - expected).norm() <= 1e-5 * expected.norm()

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_outputs_in_any_order_of_memory_get_the_branch(self, contiguous):
        layer = made("conv")
        (transform,) = transforms = create([("lowrank", {"rank": 3})], layer, None)
        branched = quantize_layer(layer, FP4, None, transforms=transforms)
        x, parts = inputs(layer), branched.parts(transform)
        y = torch.zeros(4, 12, 3, 3)
        y = y if contiguous else y.to(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = layer._conv_forward(x, transform._branch(parts), None)
            assert torch.allclose(transform.add_to(y, branched, x, parts), expected, atol=1e-4)

    def test_it_runs_under_autocast(self):
        layer = made("linear")
        branched = quantize_layer(layer, FP4, None, transforms=create([("lowrank", {"rank": 3})], layer, None))
        x = inputs(layer)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = branched(x)
        assert output.dtype == torch.bfloat16
        with torch.no_grad():
            assert (output.float() - branched(x)).norm() < 0.02 * output.float().norm()

    @pytest.mark.parametrize("kind", ["linear", "conv"])
    def test_lqer_beats_a_plain_svd_of_the_error_where_channels_differ(self, kind):
        layer = made(kind)
        x = inputs(layer, rows=16)
        weight = layer.weight.detach()
        error = weight - quantize_layer(layer, FP4, None).dequantize(torch.float32)
        dim = -1 if kind == "linear" else 1
        magnitude = x.movedim(dim, -1).flatten(0, -2).abs().mean(0)

        def left(importance):
            (transform,) = create([("lowrank", {"rank": 4, "of": "error"})], layer, None)
            parts = correction_of(transform)(transform, Residuals(error, importance, torch.zeros(1, len(weight))))
            twin = copy.deepcopy(layer)
            twin.weight.data, twin.bias = transform.undo(-error, parts), None
            with torch.no_grad():
                return twin(x).square().mean()

        twin = copy.deepcopy(layer)
        twin.weight.data, twin.bias = error, None
        with torch.no_grad():
            without = twin(x).square().mean()
        assert left(magnitude) < left(torch.ones_like(magnitude)) < without


class TestOutliers:
    """EasyQuant's sparse weights."""

    def test_the_farthest_from_the_mean_are_kept_and_widen_no_scale(self):
        torch.manual_seed(0)
        layer = nn.Linear(128, 64)
        layer.weight.data = torch.randn(64, 128)
        chosen = torch.randperm(64 * 128)[:25]
        layer.weight.data.view(-1)[chosen] = 30 + torch.randn(25)
        settings = [("outliers", {"share": 25 / (64 * 128)})]
        per_row = WeightSpec.parse("fp4", "channel")
        quantized = quantize_layer(layer, per_row, None, transforms=create(settings, layer, None))
        kept = quantized.float_weight().view(-1)[chosen]
        assert torch.allclose(kept, layer.weight.view(-1)[chosen], rtol=2**-8)
        plain = quantize_layer(layer, per_row, None)
        rest = torch.ones(64 * 128, dtype=torch.bool).index_fill(0, chosen, False)
        errors = [(one.float_weight() - layer.weight).view(-1)[rest].square().sum() for one in (plain, quantized)]
        assert errors[1] < 0.65 * errors[0]

    @pytest.mark.parametrize("share", [0.004, 0.5, 1])
    def test_constant_weights_and_nothing_but_outliers_work(self, share):
        layer = made("conv")
        layer.weight.data.fill_(0.3)
        quantized = quantize_layer(layer, FP4, None, transforms=create([("outliers", {"share": share})], layer, None))
        assert torch.allclose(quantized.float_weight(), layer.weight, rtol=0.02)

    def test_rows_of_many_columns_take_wider_indices(self):
        layer = nn.Linear(40_000, 2)
        (transform,) = create([("outliers", {"share": 0.001})], layer, None)
        assert transform.parts()["columns"].dtype == torch.int32
        quantized = quantize_layer(layer, FP4, None, transforms=(transform,))
        largest = layer.weight.abs().view(-1).topk(80).indices
        assert torch.allclose(quantized.float_weight().view(-1)[largest], layer.weight.view(-1)[largest], rtol=2**-8)


class TestRotate:
    """Hadamard blocks."""

    @pytest.mark.parametrize(
        ("shape", "split", "size"),
        [((8, 128), None, 64), ((8, 96), None, 32), ((8, 7), None, 1), ((8, 128), 80, 16), ((8, 24, 3, 3), None, 8)],
    )
    def test_the_block_is_the_largest_that_fits(self, shape, split, size):
        method = get_method("rotate")
        assert method.storage(method.Options(), shape, split).size == size

    def test_it_is_the_orthogonal_matrix_of_sylvester(self):
        matrix = torch.tensor([[1.0]])
        for _ in range(3):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        assert torch.allclose(hadamard(torch.eye(8), 8, 1), matrix / 8**0.5)
        x = torch.randn(3, 16, 5)
        assert torch.allclose(hadamard(hadamard(x, 8, 1), 8, 1), x, atol=1e-6)

    def test_of_regular_order_it_is_the_orthogonal_matrix_of_convrot(self):
        of_four = 1 - 2 * torch.eye(4).flip(0)
        matrix = torch.kron(of_four, of_four)
        assert torch.allclose(regular_hadamard(torch.eye(16), 16, 1), matrix / 4)
        assert (matrix.sum(1) == 4).all()
        x = torch.randn(3, 32, 5)
        assert torch.allclose(regular_hadamard(regular_hadamard(x, 16, 1), 16, 1), x, atol=1e-6)
        method = get_method("rotate")
        sizes = [method.storage(method.Options(order="regular"), (8, width)).size for width in (256, 96, 40, 6, 7)]
        assert sizes == [64, 16, 4, 1, 1]

    def test_it_spreads_outlier_channels(self):
        torch.manual_seed(0)
        layer = nn.Linear(128, 32, bias=False)
        x = torch.randn(64, 128)
        x[:, [5, 90]] *= 60
        int4 = ActivationSpec.parse("int4")
        plain = quantize_layer(layer, WeightSpec.parse("int8"), int4)
        rotated = quantize_layer(
            layer, WeightSpec.parse("int8"), int4, transforms=create([("rotate", {})], layer, None)
        )
        with torch.no_grad():
            errors = [(one(x) - layer(x)).square().mean() for one in (plain, rotated)]
        assert errors[1] < 0.7 * errors[0]


class TestBias:
    """What is added to the output."""

    def test_each_row_of_the_batch_gets_the_correction_of_its_timestep(self):
        for kind in ("linear without bias", "conv"):
            layer = made(kind)
            transforms = create([("bias", {"ranges": 4})], layer, None)
            quantized = quantize_layer(layer, FP4, None, transforms=transforms)
            x = inputs(layer, rows=4)
            quantized.timestep_ranges = TimestepRanges({4})
            quantized.timestep_ranges.set(torch.tensor([10.0, 990.0]))
            plain = quantized(x)
            table = torch.randn(4, len(layer.weight))
            quantized.load_parts({"bias": {"table": table}})
            dim = -1 if isinstance(layer, nn.Linear) else 1
            added = (quantized(x) - plain).movedim(dim, -1)
            expected = table[[0, 0, 3, 3]].view(4, *[1] * (added.ndim - 2), -1).expand_as(added)
            assert torch.allclose(added, expected, atol=1e-5)
