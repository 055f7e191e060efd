"""The integer kernel: exact sums in all instructions of this machine, the reference's codes, and when it steps back."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.cpu import compiling, integer, products
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.layers import quantize_layer
from dmquant.operands import unit_of
from dmquant.qtensor import WeightSpec

needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="no C++ compiler")
CPU = torch.device("cpu")


def levels():
    """The sets of instructions that this machine has, from the simplest up."""
    if compiling.missing_compiler():
        return []
    return products.LEVELS[: products.compiled().best_level() + 1]


def layer_of(float_layer, weights="fp4", granularity="group:32", store="pow2", inputs="int8", of="token", **more):
    spec = WeightSpec.parse(weights, granularity, "absmax", store, split=more.get("split"))
    layer = quantize_layer(float_layer, spec, ActivationSpec.parse(inputs, of, split=more.get("split")))
    return layer.requires_grad_(False)


def exact(layer, x):
    """The output in real arithmetic, float64, of the values that weights and inputs are rounded to."""
    double = layer.quantize_input(x.float()).double(), layer.dequantize(torch.float32).double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(*double, bias)
    return nn.functional.conv2d(*double, bias, layer.stride, layer.padding, layer.dilation)


def close(y, expected, dtype):
    """Whether `y` is `expected` rounded to a dtype after a few roundings in float32."""
    bound = 2.0**-21 * expected.abs().max() + torch.finfo(dtype).eps / 2 * expected.abs()
    return bool(((y.double() - expected).abs() <= bound).all())


def plan_of(packed, values, fmt, of_outputs):
    """A plan of codes of 8 bits, with one group an output."""
    tables = torch.stack([0 * values, values]).to(torch.int8)
    factors = torch.ones(len(packed), 1, dtype=torch.uint8)
    columns = packed.shape[1]
    return products.Plan(products.Weight(packed, tables, factors, of_outputs, None, fmt, columns, (columns,), 1))


@needs_compiler
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("inputs", "weights"), [("int8", 64), ("fp6_e2m3", 127)])
def test_sums_are_those_of_exact_arithmetic(level, inputs, weights, monkeypatch):
    """Six million operands, a third of them the largest, against float64, which holds such sums exactly."""
    monkeypatch.setenv(products.VARIABLE, level)
    fmt, generator = get_format(inputs), torch.Generator().manual_seed(0)
    rows, outputs, columns, unit = 607, 610, 5003, unit_of(fmt)
    weights = min(weights, products.largest_weight(fmt, products.level()))
    x = fmt.values[torch.randint(0, len(fmt.values), (rows, columns), generator=generator)]
    x[: rows // 6], x[rows // 6 : rows // 3] = fmt.values[-1], fmt.values[0]
    packed = torch.randint(0, 256, (outputs, columns), dtype=torch.uint8, generator=generator)
    packed[: outputs // 3], packed[outputs // 3 : outputs // 2] = 255, 0
    values = torch.linspace(-weights, weights, 256).round().to(torch.int32)
    plan = plan_of(packed, values, fmt, torch.full((1, outputs), unit))
    expected = ((x.double() / unit) @ values[packed.long()].double().T).float() * unit
    for one in (plan, products.Plan(plan.weight, plan.expanded())):
        assert torch.equal(one.run(x, given=torch.ones(rows)), expected)


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["fp6_e2m3", "fp4_e2m1", "fp4_e3m0", "fp5_e2m2", "fp6_e1m4", "int8", "int6", "int4", "int2"]),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-124, 126),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    granularity=st.sampled_from(["token", "image", "tensor"]),
)
def test_inputs_are_rounded_as_the_reference_does_bit_for_bit(name, seed, exponent, dtype, granularity):
    """At all sizes of numbers, with halves of steps, zeros, infinities and tokens of nothing else among them.

    The weight is the identity, so the rounded input comes out.
    """
    spec, generator = ActivationSpec.parse(name, granularity), torch.Generator().manual_seed(seed)
    x = torch.randn(9, 133, generator=generator) * 2.0**exponent
    x[1] = torch.randint(-64, 65, (133,), generator=generator) / 16 * 2.0**exponent
    x[2, ::2], x[3] = 0, 0
    if granularity == "token":
        x[4, 5] = torch.inf
    x = x.to(dtype)
    unit, one = unit_of(spec.fmt), torch.zeros(256, dtype=torch.int32)
    one[1] = 1
    plan = plan_of(torch.eye(133).to(torch.uint8), one, spec.fmt, torch.full((1, 133), unit))
    together = {"token": 1, "image": 1, "tensor": 9}[granularity]
    assert torch.equal(plan.run(x, together), fake_quantize(x, spec))


@needs_compiler
@pytest.mark.parametrize("level", levels()[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("weights", "granularity", "store", "inputs", "of"),
    [
        ("fp4_e2m1", "group:32", "pow2", "fp6_e2m3", "token"),
        ("fp4_e2m1", "group:16", "pow2", "int4", "token"),
        ("fp4_e1m2", "group:24", "pow2:3", "fp6_e1m4", "token"),
        ("fp4_e2m1", "group:16", "int", "int8", "token"),
        ("fp4_e3m0", "channel", "bf16", "fp6", "tensor"),
        ("int2", "group:10", "pow2", "int8", "token"),
        ("int3", "tensor", "fp32", "int6", "token"),
        ("int5", "channel", "fp32", "int5", "tensor"),
        ("int8", "channel", "e8m0", "fp6", "token"),
    ],
)
def test_a_linear_layer_is_real_arithmetic_rounded_once(
    level, dtype, weights, granularity, store, inputs, of, monkeypatch
):
    monkeypatch.setenv(products.VARIABLE, level)
    torch.manual_seed(0)
    float_layer = nn.Linear(154, 71, bias=granularity != "channel")
    float_layer.weight.data *= torch.rand(71, 1) * 3  # few octaves within a row, whatever the groups
    layer, x = layer_of(float_layer, weights, granularity, store, inputs, of), torch.randn(3, 13, 154).to(dtype)
    with kernels.forced("integer"):
        y = layer(x)
    assert y.dtype == dtype
    assert close(y, exact(layer, x), dtype)
    with kernels.keeping_weights("speed"):
        assert torch.equal(layer(x), y)
    assert layer.kernel_panels0.dtype == torch.int8
    assert torch.equal(layer(x), y)
    assert not hasattr(layer, "kernel_panels0")


@needs_compiler
@pytest.mark.parametrize("level", levels()[1:])
@pytest.mark.parametrize("split", [None, 12])
@pytest.mark.parametrize(
    ("channels", "kernel", "more"),
    [
        (32, 3, {"padding": 1}),
        (30, (3, 2), {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}),
        (18, 1, {}),
        (32, 1, {"stride": 2}),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_real_arithmetic_rounded_once(
    level, split, channels, kernel, more, memory_format, monkeypatch
):
    monkeypatch.setenv(products.VARIABLE, level)
    torch.manual_seed(0)
    of = "token" if kernel == 1 and not more else "image"
    layer = layer_of(nn.Conv2d(channels, 21, kernel, **more), "fp4", "channel", "fp32", "fp6", of, split=split)
    x = torch.randn(2, channels, 9, 14).to(memory_format=memory_format)
    with kernels.forced("integer"):
        y = layer(x)
        assert close(y, exact(layer, x), torch.float32)
        assert torch.equal(layer(x[0]), y[0]), "no image depends on its neighbours"
        bfloat16 = layer(x.bfloat16())
    assert close(bfloat16, exact(layer, x.bfloat16()), torch.bfloat16)


@needs_compiler
def test_static_scales_are_taken_as_they_are():
    torch.manual_seed(0)
    spec = ActivationSpec.parse("int8", "tensor", scale="static:1")
    layer = quantize_layer(
        nn.Conv2d(8, 6, 3, padding=1), WeightSpec.parse("int4", "channel"), spec, input_scale=torch.tensor([[0.01]])
    ).requires_grad_(False)
    x = torch.randn(2, 8, 6, 6)
    with kernels.forced("integer"):
        assert close(layer(x), exact(layer, x), torch.float32)


@needs_compiler
def test_nan_stays_in_its_token_and_threads_change_nothing():
    layer, x = layer_of(nn.Linear(64, 130)), torch.randn(50, 64)
    clean = layer(x)
    assert layer.kernel == "integer"
    x[7, 3] = torch.nan
    y = layer(x)
    assert y[7].isnan().all()
    others = torch.arange(50) != 7
    assert torch.equal(y[others], clean[others])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x)[others], clean[others])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_calls_that_a_gradient_goes_through_or_that_have_no_tokens_are_the_reference():
    layer, x = layer_of(nn.Linear(64, 8)), torch.randn(5, 64, requires_grad=True)
    with kernels.forced("reference"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer(torch.empty(0, 64)).shape == (0, 8)
    vector, by_image = torch.randn(64), layer_of(nn.Linear(64, 8), of="image")  # which has no rows
    with kernels.forced("reference"):
        expected = by_image(vector)
    assert torch.equal(by_image(vector), expected)


@needs_compiler
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("weights", "granularity", "store"), [("int4", "group:16", "int"), ("fp4", "group:24", "e4m3")]
)
def test_traces_and_transforms_are_given_operations_that_they_see(weights, granularity, store):
    """What is computed by address alone would be missing in a trace: its outputs would be memory never written."""
    layer, x = layer_of(nn.Linear(48, 8), weights, granularity, store, "int8", "token"), torch.randn(5, 48)
    layer(x)
    with kernels.forced("reference"):
        expected, batched = layer(x), layer(x.expand(3, 5, 48))
    assert torch.equal(torch.vmap(layer)(x.expand(3, 5, 48)), batched)
    value, slope = torch.func.jvp(layer, (x,), (x,))
    assert torch.equal(value, expected)
    assert slope.abs().max() > 0
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace takes no packed codes"):  # and not numbers of no meaning
        torch.jit.trace(layer, (x,))


@needs_compiler
def test_it_compiles_into_one_graph():
    layer, x = layer_of(nn.Linear(64, 8)), torch.randn(5, 64)
    conv, image = (
        layer_of(nn.Conv2d(4, 6, 3, padding=1), "fp4", "channel", "fp32", "fp6", "tensor"),
        torch.randn(1, 4, 7, 7),
    )
    model = nn.ModuleList([layer, conv])

    def both(x, image):
        return model[0](x), model[1](image) * 2

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    made = compiled(x, image)  # before any call has chosen kernels
    assert [one.kernel for one in model] == ["integer"] * 2
    for y, again, eager in zip(made, compiled(x, image), both(x, image), strict=True):
        assert torch.equal(y, eager)
        assert torch.equal(again, eager)
        assert y.stride() == eager.stride()


@needs_compiler
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_graph_is_told_the_strides_that_outputs_have(kernel, memory_format):
    """Inductor's code ends with an error where they differ."""
    layer = layer_of(nn.Conv2d(4, 6, kernel), "fp4", "channel", "fp32", "fp6", "image")
    x = torch.randn(2, 4, 7, 7).to(memory_format=memory_format)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    operands = layer.qweight, integer._made(layer), layer.bias, None, "fp6_e2m3", "image", integer._about(layer)
    geometry = [*layer.stride, *layer.padding, *layer.dilation]
    torch.library.opcheck(torch.ops.dmquant.integer_product, (x, *operands, geometry), test_utils="test_faketensor")


def with_inputs(**settings):
    return quantize_layer(nn.Linear(64, 8), WeightSpec.parse("int4"), ActivationSpec.parse("int8", **settings))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: quantize_layer(nn.Linear(64, 8), WeightSpec.parse("fp4"), None), "inputs are not quantized"),
        (lambda: layer_of(nn.Linear(64, 8), inputs="fp8"), "inputs in fp8_e4m3 are no small integers"),
        (lambda: layer_of(nn.Linear(64, 8), "fp6_e3m2"), "weights in fp6_e3m2 are no small integers"),
        (lambda: layer_of(nn.Linear(64, 8), store="bf16"), "are no small multiples of one: use store: int"),
        (lambda: layer_of(nn.Linear(64, 8), of="group:16"), "a scale for every group:16"),
        (lambda: with_inputs(rule="mse"), "scales of its inputs are fitted by mse"),
        (lambda: with_inputs(center="image"), "the mean of its inputs is not quantized"),
        (lambda: layer_of(nn.Conv2d(8, 8, 3)), "a scale for every pixel .* use activation_granularity: image"),
        (lambda: layer_of(nn.Conv2d(8, 8, 3, groups=2), of="tensor"), "convolutions of one group"),
    ],
)
def test_it_says_in_a_line_what_it_cannot_run(layer, reason):
    layer = layer()
    with (
        kernels.forced("integer"),
        pytest.raises(UsageError, match=f"kernel 'integer' cannot run this layer: .*{reason}"),
    ):
        layer(torch.randn(2, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 5, 5))


@needs_compiler
def test_weights_that_would_saturate_are_refused_where_they_do(monkeypatch):
    layer = layer_of(nn.Linear(64, 8), "int8", "channel", "fp32")
    for level in levels()[1:]:
        monkeypatch.setenv(products.VARIABLE, level)
        refused = kernels.KERNELS["integer"].refuses(layer, CPU)
        assert (refused is not None) == (level == "avx2")
        assert refused is None or "avx2 is exact up to 64" in refused


def test_without_a_compiler_the_next_kernel_runs_after_one_note(monkeypatch, caplog):
    memories = compiling.library, compiling.missing_compiler, compiling._made, compiling._note, products.compiled
    for cached in memories:
        cached.cache_clear()
    monkeypatch.setattr(compiling, "_compiler", lambda: None)
    try:
        with caplog.at_level(logging.WARNING):
            first, second = layer_of(nn.Linear(64, 8)), layer_of(nn.Linear(64, 8))
            assert first(torch.randn(2, 64)).isfinite().all()
            assert second.kernel == "cpu"
        assert [record.name for record in caplog.records] == ["dmquant"]
        with kernels.forced("integer"), pytest.raises(UsageError, match="a C\\+\\+ compiler: install g\\+\\+ or clang"):
            first(torch.randn(2, 64))
    finally:
        for cached in memories:
            cached.cache_clear()
