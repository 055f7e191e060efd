"""Where a layer's input is a concatenation, its two halves share no scale, neither of the weights nor of the inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, fake_quantize, static_scale
from dmquant.convert import plan, quantize_
from dmquant.cpu import expanding, lookup
from dmquant.errors import UsageError
from dmquant.kernels import reference
from dmquant.layers import QUANTIZED, quantize_layer
from dmquant.pipelines.runs.footprint import footprint, remainder
from dmquant.qtensor import WeightSpec, quantize
from dmquant.recipe import Recipe, Rule
from dmquant.scaling import STORES

FORMATS = ("fp4", "fp4_e3m0", "fp6", "fp8", "int3", "int8", "lut4")
GRANULARITIES = ("tensor", "channel", "group:16", "group:64")
LAYERS = {
    "linear": (nn.Linear(40, 24), (2, 7, 40), -1),
    "shortcut": (nn.Conv2d(40, 24, 1), (2, 40, 6, 5), 1),
    "conv": (nn.Conv2d(40, 24, 3, padding=1), (2, 40, 6, 5), 1),
}
SPLIT = 28
ONLINE = [ActivationSpec.parse("fp6", granularity) for granularity in ("token", "tensor", "group:16")]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves_of(layer):
    """Two float layers, each for its half of the input channels, whose outputs add up to that of `layer`."""
    twins = []
    for part, bias in ((slice(None, SPLIT), layer.bias), (slice(SPLIT, None), None)):
        twin = copy.deepcopy(layer)
        twin.weight = nn.Parameter(layer.weight.detach()[:, part].clone())
        twin.bias = bias
        channels = twin.weight.shape[1]
        twin.in_features = twin.in_channels = channels
        twins.append(twin)
    return twins


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 5),
    channels=st.integers(2, 40),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 2)]),
    format=st.sampled_from(FORMATS),
    granularity=st.sampled_from(GRANULARITIES) | st.integers(1, 50).map("group:{}".format),
    rule=st.sampled_from(["absmax", "mse"]),
    store=st.sampled_from(list(STORES)),
)
def test_a_split_weight_is_its_halves_quantized_alone(data, rows, channels, kernel, format, granularity, rule, store):
    split = data.draw(st.integers(1, channels - 1))
    w = weights(rows, channels, *kernel)
    if STORES[store].base_of:  # scales relative to what halves share: give each half the same largest weight
        w[:, 0] = w[:, -1] = 5.0
    rule = "absmax" if STORES[store].factors else rule  # a search of what they share looks at both
    spec = WeightSpec.parse(format, granularity, rule, store)
    alone = [quantize(half, spec) for half in (w[:, :split], w[:, split:])]
    together = quantize(w, WeightSpec.parse(format, granularity, rule, store, split))
    assert torch.equal(together.dequantize(), torch.cat([half.dequantize() for half in alone], 1))
    assert together.scale.shape == together.spec.scale_shape(w.shape)
    assert together.scale.numel() == sum(half.scale.numel() for half in alone)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    channels=st.integers(2, 40),
    format=st.sampled_from(["fp4", "fp6", "fp8", "fp4_e3m0"]),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 99),
)
def test_a_finer_scale_for_the_quieter_half_loses_nothing_of_any_weight(data, channels, format, exponent, seed):
    """`pow2` scales clip nothing and differ by octaves, and a float grid holds the lower half of its double."""
    split = data.draw(st.integers(1, channels - 1))
    w = weights(6, channels, 3, 3, seed=seed)
    w[:, :split] *= 2.0**exponent
    whole, halves = (
        (quantize(w, WeightSpec.parse(format, "channel", "absmax", "pow2", cut)).dequantize() - w).abs()
        for cut in (None, split)
    )
    assert (halves <= whole).all()


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("format", ["int4", "fp4"])
def test_a_half_is_not_scaled_by_the_louder_one(format, granularity, rule):
    w = weights(16, 64, 1, 1)
    w[:, :32] *= 0.05
    whole, halves = (
        (quantize(w, WeightSpec.parse(format, granularity, rule, split=cut)).dequantize() - w)[:, :32].square().mean()
        for cut in (None, 32)
    )
    assert halves < 0.1 * whole


@pytest.mark.parametrize(
    ("granularity", "scales"), [("group:64", 8 * (3 + 2)), ("group:9", 8 * 24), ("channel", 8 * 2), ("tensor", 2)]
)
def test_bytes_are_those_of_codes_and_scales_of_both_halves(granularity, scales):
    q = quantize(weights(8, 24, 3, 3), WeightSpec.parse("fp4", granularity, split=16))
    assert q.scales.stored.numel() == scales
    assert q.nbytes == 8 * 24 * 9 / 2 + 2 * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_table_kernel_gives_the_reference_bit_for_bit(format, store, dtype):
    for shape, split in (((6, 96), 32), ((6, 96), 37), ((4, 24, 3, 3), 16), ((4, 24, 3, 3), 5), ((4, 24, 1, 1), 8)):
        for granularity in ("group:16", "group:8", "channel", "tensor"):
            q = quantize(weights(*shape), WeightSpec.parse(format, granularity, store=store, split=split))
            arguments = (q.codes, q.scale, q.spec, q.shape, dtype)
            expected = reference.dequantize(*arguments)
            assert torch.equal(lookup.dequantize(*arguments), expected)
            assert torch.equal(expanding.dequantize(*arguments), expected)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    channels=st.integers(2, 40),
    dim=st.sampled_from([-1, -3]),
    granularity=st.sampled_from(["token", "tensor"]) | st.integers(1, 50).map("group:{}".format),
    format=st.sampled_from(["fp4", "fp6", "int8", "mxfp6"]),
)
def test_a_split_input_is_its_halves_quantized_alone(data, channels, dim, granularity, format):
    split = data.draw(st.integers(1, channels - 1))
    x = weights(2, 3, channels).mul(weights(2, 3, 1).exp()) if dim == -1 else weights(2, channels, 3, 2)
    halves = x.split((split, channels - split), dim)
    alone = [fake_quantize(half, ActivationSpec.parse(format, granularity), dim) for half in halves]
    spec = ActivationSpec.parse(format, granularity, split=split)
    assert torch.equal(fake_quantize(x, spec, dim), torch.cat(alone, dim))
    assert torch.equal(lookup.fake_quantize(x, spec, dim), torch.cat(alone, dim))


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 10), -1), ((2, 10, 3, 4), -3), ((10, 3, 4), -3), ((2, 2), -1)])
def test_a_static_scale_a_half_is_that_of_the_halves_alone(shape, dim):
    split = 1 if shape[dim] == 2 else 7
    x, scale = weights(*shape), torch.tensor([[0.3, 0.05]])
    plain = ActivationSpec.parse("fp6", "tensor", scale="static:1")
    halves = x.split((split, shape[dim] - split), dim)
    alone = [fake_quantize(half, plain, dim, one) for half, one in zip(halves, (0.3, 0.05), strict=True)]
    spec = ActivationSpec.parse("fp6", "tensor", scale="static:1", split=split)
    assert spec.scale_shape(shape[dim]) == scale.shape
    both = fake_quantize(x, spec, dim, static_scale(scale, None, x, dim, spec.split))
    assert torch.equal(both, torch.cat(alone, dim))


def test_one_static_scale_a_channel_knows_no_halves():
    specs = [ActivationSpec.parse("fp6", "channel", scale="static:4", split=split) for split in (None, 3)]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("activations", [None, *ONLINE, ActivationSpec.parse("fp6", "tensor", scale="static:1")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_split_layer_is_two_layers_on_the_halves_added(name, granularity, activations):
    layer, shape, dim = copy.deepcopy(LAYERS[name][0]), *LAYERS[name][1:]
    layer.weight.data[:, SPLIT:] *= 0.3
    x, spec = weights(*shape, seed=1), WeightSpec.parse("fp4", granularity)
    split_spec = WeightSpec.parse("fp4", granularity, split=SPLIT)
    split_activations, scales, one_each = None, None, (None, None)
    if activations is not None:
        static = activations.ranges is not None
        split_activations = ActivationSpec.parse(
            "fp6", str(activations.granularity), scale="static:1" if static else "online", split=SPLIT
        )
        if static:
            scales = torch.tensor([[0.3, 0.4]])
            one_each = scales.split(1, 1)
    quantized = quantize_layer(layer, split_spec, split_activations, input_scale=scales)
    first, rest = (
        quantize_layer(half, spec, activations, input_scale=scale)
        for half, scale in zip(halves_of(layer), one_each, strict=True)
    )
    expected = first(x.narrow(dim, 0, SPLIT)) + rest(x.narrow(dim, SPLIT, 40 - SPLIT))
    output = quantized(x)
    assert torch.allclose(output, expected, atol=1e-5)
    unsplit = quantize_layer(layer, spec, activations, input_scale=one_each[0])
    assert not torch.allclose(output, unsplit(x), atol=1e-3)
    with kernels.forced("cpu"):
        by_cpu = quantized(x)
    with kernels.forced("reference"):
        assert torch.equal(quantized(x), by_cpu)
    assert torch.allclose(output, by_cpu, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_of_what_both_represent_exactly_split_and_unsplit_give_the_same_bits(name, granularity):
    layer, shape, dim = copy.deepcopy(LAYERS[name][0]), *LAYERS[name][1:]
    generator = torch.Generator().manual_seed(0)
    fp4, fp6 = (WeightSpec.parse(format).fmt for format in ("fp4", "fp6"))

    def on_the_grid(fmt, shape, channel_dim):
        """Every few channels hold the largest value, so that all scales are 1."""
        x = fmt.values[torch.randint(len(fmt.values), shape, generator=generator)]
        x.movedim(channel_dim, -1)[..., ::4] = fmt.max
        return x

    layer.weight.data, layer.bias.data = on_the_grid(fp4, layer.weight.shape, 1), torch.arange(24.0)
    x = on_the_grid(fp6, shape, dim)
    outputs = [
        quantize_layer(
            layer, WeightSpec.parse("fp4", granularity, split=split), ActivationSpec.parse("fp6", split=split)
        )(x)
        for split in (None, SPLIT)
    ]
    assert torch.equal(outputs[0], layer(x))
    assert torch.equal(outputs[1], layer(x))


def test_an_empty_layer_takes_the_bytes_of_a_split_one():
    for layer, shape, _ in LAYERS.values():
        spec, activations = WeightSpec.parse("nvfp4", split=SPLIT), ActivationSpec.parse("fp6", split=SPLIT)
        quantized = quantize_layer(layer, spec, activations)
        empty = QUANTIZED[type(layer)].like(layer, spec, activations, device="meta")
        empty.load_state_dict(quantized.state_dict(), assign=True)
        x = weights(*shape)
        assert torch.equal(empty(x), quantized(x))
        assert "split=28" in repr(empty)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut, self.skip_linear = nn.Conv2d(24, 8, 1), nn.Linear(24, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)


def test_a_recipe_splits_the_layers_it_is_told():
    recipe = Recipe(name="x", granularity="group:16", activations="fp6").splitting({"shortcut": 8, "skip_linear": 8})
    assert recipe.rules == [Rule(match=["shortcut", "skip_linear"], split=8)]
    net = Net()
    steps = {step.name: step for step in plan(net, recipe)}
    assert {name: (step.weights.split, step.activations.split) for name, step in steps.items()} == {
        "shortcut": (8, 8),
        "skip_linear": (8, 8),
        "depthwise": (None, None),
    }
    quantize_(net, recipe)
    assert remainder(net.shortcut) == (
        "8 weights a channel of one half do not divide into groups of 16; the last group has 8"
    )
    size = footprint(net)
    assert size.quantized_weights == 2 * 8 * 24 + 8 * 9
    assert size.quantized_bytes == (2 * 8 * 24 / 2 + 8 * 5) + 2 * 8 * (2 + 2 + 1)  # nine codes of 4 bits take 5 bytes
    x = weights(2, 24, 3, 3)
    inputs = torch.cat([fake_quantize(half, ActivationSpec.parse("fp6"), 1) for half in x.split((8, 16), 1)], 1)
    with kernels.forced("cpu"):
        assert torch.equal(net.shortcut(x), F.conv2d(inputs, net.shortcut.dequantize(x.dtype), net.shortcut.bias))


@pytest.mark.parametrize(
    ("layer", "split", "message"),
    [
        ("shortcut", 24, "layer shortcut has 24 input channels, which a split of 24 does not cut in two"),
        ("skip_linear", -3, "a split of -3 does not cut in two"),
        ("depthwise", 4, "layer depthwise is a grouped convolution: its input cannot be split"),
    ],
)
def test_a_split_that_makes_no_halves_names_the_layer(layer, split, message):
    with pytest.raises(UsageError, match=message):
        plan(Net(), Recipe(name="x").splitting({layer: split}))
    plan(Net(), Recipe(name="x").splitting({layer: split}).keeping([layer]))  # nothing to split
