"""GPU kernels: their arithmetic on the CPU, against exact arithmetic and the reference, and what they refuse.

With Triton and TRITON_INTERPRET=1, its kernels compute here too: `.ci/run` runs this file once more in that way. On a
GPU, `-k cuda` runs the kernels as they are.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, TimestepRanges, fake_quantize
from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.gpu import blocked, decode, device, fp8, int8, nvfp4, operands, ops
from dmquant.layers import quantize_layer
from dmquant.operands import unit_of
from dmquant.qtensor import WeightSpec
from dmquant.transforms import create

E4M3 = operands.E4M3
CPU = torch.device("cpu")
LINEAR = (lambda: nn.Linear(100, 42), (2, 7, 100))
LAYERS = {
    "linear": LINEAR,
    "linear without bias": (lambda: nn.Linear(64, 24, bias=False), (50, 64)),
    "3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 5)),
    "strided": (lambda: nn.Conv2d(16, 24, (3, 2), padding=(1, 0), stride=2, dilation=(1, 2)), (2, 16, 6, 7)),
    "1x1": (lambda: nn.Conv2d(16, 20, 1), (2, 16, 5, 4)),
    "without a batch": (lambda: nn.Conv2d(16, 20, 1, stride=2), (16, 5, 4)),
}


@pytest.fixture
def here(monkeypatch):
    """GPU kernels take tensors of the CPU."""
    for kernel in (int8.KERNEL, fp8.KERNEL, nvfp4.KERNEL, decode.KERNEL):
        monkeypatch.setattr(type(kernel), "missing", lambda self: None)
        monkeypatch.setattr(type(kernel), "refuses", lambda self, layer, device: self.refuses_codes(layer))


def layer_of(float_layer, weights="fp4", granularity="group:16", store="pow2:2", inputs="fp6", of="token", **more):
    spec, activations = WeightSpec.parse(weights, granularity, "absmax", store), None
    if inputs is not None:
        activations = ActivationSpec.parse(inputs, of, **more)
    static = activations is not None and activations.ranges is not None
    scale = torch.tensor([[0.3], [0.5]])[: activations.ranges] if static else None
    return quantize_layer(float_layer, spec, activations, input_scale=scale).requires_grad_(False)


def exact(layer, x):
    """The output in real arithmetic, float64, of the values that weights and inputs are rounded to."""
    with kernels.forced("reference"):
        x, weight = layer.quantize_input(x.float()).double(), layer.dequantize(torch.float32).double()
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)


def close(y, expected):
    """Whether `y` is `expected` rounded to its dtype after a few roundings in float32."""
    bound = 2.0**-21 * expected.abs().max() + torch.finfo(y.dtype).eps * expected.abs()
    return y.shape == expected.shape and bool(((y.double() - expected).abs() <= bound).all())


def combinations(kernel):
    """Weights and inputs that a kernel takes."""
    weights = [("fp4", "group:16", "pow2:2"), ("int3", "tensor", "bf16"), ("fp6", "channel", "fp32")]
    if kernel == "cuda-int8":
        return itertools.product([*weights, ("fp4", "group:16", "int")], ["fp6", "fp4_e1m2", "int4", "int8"])
    weights += [("fp4", "group:16", "pow2"), ("fp6_e3m2", "channel", "pow2"), ("fp8", "channel", "fp32")]
    return itertools.product(weights, ["fp6", "int4", "fp8"])


@pytest.mark.parametrize("kernel", ["cuda-int8", "cuda-fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_real_arithmetic(here, kernel, name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    for index, (weights, inputs) in enumerate(combinations(kernel)):
        of = ("token", "image", "tensor")[index % 3 if "linear" in name or name == "1x1" else 1 + index % 2]
        dtype, kept = (torch.float32, torch.bfloat16, torch.float16)[index % 3], kernels.KEPT[index % 2]
        layer, x = layer_of(make(), *weights, inputs, of).to(dtype), torch.randn(shape).to(dtype)
        with kernels.forced(kernel), kernels.keeping_weights(kept):
            y = layer(x)
        assert y.dtype == dtype
        assert close(y, exact(layer, x)), (weights, inputs)
        expanded = {tensor.dtype for tensor in layer.buffers() if tensor.numel() > layer.qweight.numel()}
        assert bool(expanded & {torch.int8, E4M3}) == (kept == "speed")


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_weights_are_exact_as_operands(dtype):
    kernel = {torch.int8: int8.KERNEL, E4M3: fp8.KERNEL}[dtype]
    for weights, _ in combinations(kernel.name):
        layer = layer_of(nn.Linear(72, 20), *weights)
        made = operands.operand(layer, dtype)
        with torch.no_grad():
            for name, part in kernel.prepare(layer).items():
                layer.register_buffer(f"kernel_{name}", part, persistent=False)
            operand = kernel.weight(layer)
        assert operand.dtype == dtype
        assert all(size % kernel.MULTIPLE == 0 for size in operand.shape)
        assert not operand.float()[20:].any()
        assert not operand.float()[:, 72:].any()
        scaled = operand.double()[:20, :72] * made.channel.double().unsqueeze(1)
        assert torch.allclose(scaled, layer.dequantize(torch.float32).double(), rtol=2.0**-23, atol=0), weights


def test_which_formats_are_exact_in_eight_bits():
    """int8 holds values of up to 127 times the smallest; E4M3 those of four digits."""
    names = ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp4_e3m0", "fp4_e1m2", "int4", "int5", "fp8_e4m3"]
    others = ["fp6_e1m4", "int6", "fp8_e3m4", "fp8_e5m2"]
    assert [name for name in names + others if operands.unit(get_format(name), E4M3)] == names
    assert operands.octaves(get_format("fp4"), torch.int8) == (3, 0)
    assert sum(operands.octaves(get_format("fp4"), E4M3)) == 14
    assert operands.unit(get_format("int8"), torch.int8) == unit_of(get_format("int8")) == 1


def clipped(bits):
    """A product that keeps so many bits of each partial sum of 32 products, as tensor cores with narrow sums do."""

    def product(a, b):
        sums = torch.zeros(len(a), len(b), dtype=torch.float64)
        for part in range(0, a.shape[1], 32):
            sums += a[:, part : part + 32].double() @ b[:, part : part + 32].double().T
            step = torch.exp2(sums.abs().clamp(min=1).log2().floor() - bits + 1)
            sums = (sums / step).trunc() * step
        return sums.float()

    return product


def test_the_trial_of_sums_finds_narrow_ones_and_takes_float32():
    a, b = (device.worst_operands(get_format(name), E4M3, 2 * up, CPU) for up, name in enumerate(("fp6", "fp4")))
    assert device.exact(clipped(24), a, b)
    assert not device.exact(clipped(14), a, b)
    assert fp8.sums_are_exact("fp6_e2m3", "fp4_e2m1", 2, CPU)
    codes = device.worst_operands(get_format("int8"), torch.int8, 0, CPU)
    assert int8._fails(CPU) is None
    assert int(int8.product(codes, codes).abs().max()) == 4608 * 127**2


def test_the_fastest_way_is_taken_of_those_that_run():
    def failing():
        raise RuntimeError("out of shared memory")

    calls = [lambda: 3.0, failing, lambda: 1.0, lambda: 2.0]
    assert int8.fastest(calls, lambda call: call()) == 2
    assert int8.fastest(calls[:2], lambda call: call()) == 0


def test_fp8_leaves_to_integers_what_it_cannot_sum_exactly(monkeypatch):
    layer = layer_of(nn.Linear(96, 32))
    assert fp8.KERNEL.fails(layer, CPU) is None
    wide = layer_of(nn.Linear(96 * 64, 16), store="pow2:3")
    assert "sums up to 35,389,440 are not exact" in fp8.KERNEL.fails(wide, CPU)
    monkeypatch.setattr(fp8, "sums_are_exact", lambda *args: False)
    assert "those of integers are: cuda-int8" in fp8.KERNEL.fails(layer, CPU)
    assert fp8.KERNEL.fails(layer_of(nn.Linear(96, 32), "fp8", "channel", "fp32", "fp8"), CPU) is None


REFUSED = [
    ("cuda-int8", {"inputs": None}, "its inputs are not quantized"),
    ("cuda-int8", {"inputs": "fp8"}, "inputs in fp8_e4m3 are not exact in int8"),
    ("cuda-fp8", {"inputs": "int8"}, "inputs in int8 are not exact in FP8 E4M3"),
    ("cuda-int8", {"of": "group:16"}, "inputs have a scale for every group:16"),
    ("cuda-int8", {"store": "e4m3"}, "in store e4m3 are no multiples of one"),
    ("cuda-fp8", {"weights": "int4", "store": "int"}, "int4 times 8 and less is not exact in FP8 E4M3"),
    ("cuda-int8", {"store": "pow2"}, "span 14 octaves, int8 holds 3"),
    ("cuda-int8", {"weights": "fp8"}, "weights in fp8_e4m3 are not exact in int8"),
    ("cuda-nvfp4", {}, "weights are not in nvfp4"),
    ("cuda-nvfp4", {"store": "e4m3"}, "inputs are not in nvfp4"),
]


@pytest.mark.parametrize(("kernel", "of_layer", "why"), REFUSED)
def test_what_a_kernel_cannot_run_it_refuses_with_the_reason(here, kernel, of_layer, why):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    linear.weight.data[0, :16] = 0
    linear.weight.data[1, :16] *= 0.3
    layer = layer_of(linear, **of_layer)
    with kernels.forced(kernel), pytest.raises(UsageError, match=why):
        layer(torch.randn(3, 64))


def test_without_a_gpu_each_kernel_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    layer = layer_of(nn.Linear(64, 32))
    for kernel in (int8.KERNEL, fp8.KERNEL, nvfp4.KERNEL, decode.KERNEL):
        assert "NVIDIA GPU" in kernel.missing()
        assert "it runs on CUDA, not on cpu" in kernel.refuses(layer, CPU)


def test_transforms_of_the_input_run_and_weights_beside_the_codes_are_refused(here):
    layers = {}
    for name in ("rotate", "outliers"):
        linear = nn.Linear(64, 32)
        transforms = create([(name, {})], linear, None)
        spec, inputs = WeightSpec.parse("fp4", "group:16", "absmax", "pow2:2"), ActivationSpec.parse("fp6")
        layers[name] = quantize_layer(linear, spec, inputs, transforms=transforms).requires_grad_(False)
    x = torch.randn(3, 64)
    with kernels.forced("cuda-int8"):
        assert close(layers["rotate"](x), exact(layers["rotate"], layers["rotate"].inputs(x)[-1]))
        with pytest.raises(UsageError, match="some are kept in high precision"):
            layers["outliers"](x)
    with kernels.forced("cuda"):
        assert close(layers["outliers"](x), exact(layers["outliers"], x))


def test_nan_and_infinity_stay_in_their_token(here):
    layer, x = layer_of(nn.Linear(64, 32)), torch.randn(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    with kernels.forced("cuda-int8"):
        y = layer(x)
        assert y[1].isnan().all()
        assert not y[2].isnan().any()
        assert torch.equal(y[[0, 3]], layer(x[[0, 3]]))
        x = torch.randn(2, 8, 4, 4)
        x[1, 2, 3, 3] = torch.nan
        y = layer_of(nn.Conv2d(8, 8, 3), of="tensor", scale="static:1")(x)
        assert y[0].isfinite().all()
        assert y[1].isnan().any()


@pytest.mark.parametrize("kernel", ["cuda-int8", "cuda-fp8", "cuda"])
def test_static_scales_and_empty_inputs(here, kernel):
    layer, x = layer_of(nn.Linear(64, 32), of="tensor", scale="static:2"), torch.randn(2, 5, 64)
    layer.timestep_ranges = TimestepRanges([2])
    layer.timestep_ranges.set(torch.tensor([100.0, 900.0]))
    with kernels.forced(kernel):
        assert close(layer(x), exact(layer, x))
        assert layer(x[:, :0]).shape == (2, 0, 32)


def test_inputs_that_want_a_gradient_get_the_references(here):
    layer, x = layer_of(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True)
    with kernels.forced("reference"):
        expected = layer(x)
    with kernels.forced("cuda-int8"):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kernel", ["cuda-int8", "cuda-fp8", "cuda"])
def test_one_graph_without_breaks(here, kernel):
    layer, x = layer_of(nn.Linear(64, 32)).bfloat16(), torch.randn(3, 64).bfloat16()
    with kernels.forced(kernel):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(compiled, layer(x))


STORED = [
    ("e4m3", "group:16"),
    ("e3m4", "group:16"),
    ("pow2", "group:16"),
    ("e8m0", "group:32"),
    ("int", "group:16"),
    ("bf16", "group:24"),
]


@pytest.mark.parametrize(("store", "granularity"), [*STORED, ("fp32", "channel"), ("fp32", "tensor")])
@pytest.mark.parametrize("weights", ["fp4", "int3", "fp6", "fp8", "nl4"])
def test_decoded_weights_are_the_references(weights, store, granularity):
    for make in (lambda: nn.Linear(96, 10), lambda: nn.Conv2d(16, 6, 3)):
        layer = layer_of(make(), weights, granularity, store, None)
        for name, part in decode.KERNEL.prepare(layer).items():
            layer.register_buffer(f"kernel_{name}", part, persistent=False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(decode.KERNEL.weight(layer, dtype), layer.dequantize(dtype))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["fp4", "fp4_e3m0", "fp6", "fp6_e1m4", "fp8", "int4", "int8"]),
    st.sampled_from(["token", "group:16", "group:10", "image", "tensor"]),
    st.sampled_from(["fp32", "bf16", "e8m0", "pow2", "e4m3"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_rounded_inputs_are_the_references(fmt, granularity, store, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 48, generator=generator) * torch.randn(2, 3, 1, generator=generator).exp2()
    x[0, 0, 5], x[1, 1], x[1, 2, 7] = torch.nan, 0, torch.inf
    for split in (None, 32):
        spec, x = ActivationSpec.parse(fmt, granularity, store, split=split), x.to(dtype)
        assert torch.equal(decode.fake_quantize(x, spec, -1).nan_to_num(7), fake_quantize(x, spec).nan_to_num(7))
        x = x[:, :, :, None].movedim(2, 1)
        assert torch.equal(decode.fake_quantize(x, spec, 1).nan_to_num(7), fake_quantize(x, spec, 1).nan_to_num(7))
        x = x.movedim(1, 2)[..., 0]


@given(st.integers(1, 300), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_blocked_scales_lie_where_tensor_cores_read_them(rows, columns):
    """The formula of cuBLAS' documentation, element by element; the rest is zero."""
    scales = torch.randint(1, 256, (rows, columns), dtype=torch.uint8)
    found, across = blocked.to_blocked(scales), -(-columns // 4)
    r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    place = ((r // 128) * across + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
    assert torch.equal(found[place], scales)
    assert int((found != 0).sum()) == scales.numel()
    assert torch.equal(blocked.from_blocked(found, rows, columns), scales)


def blockwise(a, b, a_scales, b_scales, dtype):
    """What the tensor cores of Blackwell compute, from the same bytes, in float64."""

    def values(codes, scales):
        pairs = get_format("fp4").decode(torch.stack([codes & 15, codes >> 4], -1).flatten(1)).unflatten(1, (-1, 16))
        scales = get_format("fp8").decode(blocked.from_blocked(scales, len(codes), pairs.shape[1]))
        return (pairs.double() * scales.double().unsqueeze(-1)).flatten(1)

    return (values(a, a_scales) @ values(b, b_scales).T).to(dtype)


@pytest.mark.parametrize("shape", [(2, 7, 96), (5, 96), (96,)])
def test_nvfp4_operands_hold_the_references_values(here, monkeypatch, shape):
    monkeypatch.setattr(nvfp4, "product", blockwise)
    monkeypatch.setattr(nvfp4, "sums_in", lambda device: torch.float32)
    layer = quantize_layer(nn.Linear(96, 64), WeightSpec.parse("nvfp4"), ActivationSpec.parse("nvfp4"))
    layer.requires_grad_(False)
    x = torch.randn(shape) * torch.randn(*shape[:-1], 1).exp2()
    with kernels.forced("cuda-nvfp4"):
        assert close(layer(x), exact(layer, x))


def test_operators_say_the_shapes_of_their_results():
    """What torch.compile and CUDA graphs rely on: schemas, and results of fake tensors."""
    x, made = torch.randn(6, 32), layer_of(nn.Linear(32, 16))
    tables = [torch.randn(16), made.scale.detach(), torch.ones(16), torch.arange(256.0)]
    integers = torch.ones(32, 40, dtype=torch.int8), torch.ones(16, 40, dtype=torch.int8)
    calls = {
        ops.quantize_tokens: (x, None, "fp6", "fp32", torch.int8, 32, 40),
        ops.round_tokens: (x, "fp6", "group:16", "e4m3", 2),
        ops.expand: (made.qweight.detach(), *tables, 4, 32, 16, torch.bfloat16, 24, 40),
        nvfp4.quantize_blocks: (x, 3),
        int8.integer_product: (*integers, torch.rand(30), torch.rand(14), torch.randn(14), torch.bfloat16),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.whole, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["cuda-int8", "cuda-fp8", "cuda-nvfp4", "cuda"])
@pytest.mark.parametrize("name", LAYERS)
def test_cuda_kernels_compute_real_arithmetic(kernel, name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    settings = {"of": "image"} if kernel != "cuda-nvfp4" else {"store": "e4m3", "inputs": "nvfp4"}
    layer, x = layer_of(make(), **settings).cuda().bfloat16(), torch.randn(shape).cuda().bfloat16()
    if reason := kernels.KERNELS[kernel].missing() or kernels.KERNELS[kernel].refuses(layer, x.device):
        pytest.skip(reason)
    expected = exact(layer, x)
    for kept in kernels.KEPT:
        with kernels.forced(kernel), kernels.keeping_weights(kept):
            assert (
                close(layer(x), expected)
                if kernel != "cuda"
                else torch.allclose(layer(x).double(), expected, 0.02, 0.02)
            )
            assert torch.allclose(torch.compile(layer, fullgraph=True)(x).double(), expected, 0.02, 0.02)
