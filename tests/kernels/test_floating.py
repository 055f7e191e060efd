"""Products in floating point on a CPU: the dtype that is fast there, what it changes, and memory that layers share."""

import json
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.cpu import expanding, fast_dtype
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[0.5, 2.0], ids=["float32 is faster", "float32 is slower"])
def ratio(request, monkeypatch):
    """The time of a product in float32 over that in a dtype of 16 bits, on a machine of either kind."""
    monkeypatch.setattr(fast_dtype, "_ratio", lambda dtype: request.param)
    return request.param


def quantized(kind="linear", dtype=torch.bfloat16, activations="fp6", weights=("fp4",), seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(96, 40) if kind == "linear" else nn.Conv2d(32, 8, 3, padding=1)
    spec = ActivationSpec.parse(activations) if activations else None
    x = torch.randn((5, 96) if kind == "linear" else (2, 32, 6, 6))
    return quantize_layer(layer.to(dtype), WeightSpec.parse(*weights), spec), x.to(dtype)


@pytest.mark.parametrize("activations", [None, "fp6", "nvfp4"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_narrow_inputs_are_rounded_once_or_as_the_reference_rounds(ratio, kind, dtype, activations):
    layer, x = quantized(kind, dtype, activations)
    with torch.no_grad(), kernels.forced("reference"):
        reference = layer(x)
    wide = x.float() if activations is None else fake_quantize(x.float(), layer.activations, layer.channel_dim)
    product = F.linear if kind == "linear" else layer._conv_forward
    with torch.no_grad():
        output = layer(x)
        exact = product(wide, layer.dequantize(torch.float32), layer.bias.float())
    assert output.dtype == dtype
    assert torch.equal(output, exact.to(dtype) if ratio < 1 else reference)
    assert (output.float() - exact).norm() <= (reference.float() - exact).norm()


@pytest.mark.parametrize("weights", [("fp4",), ("nl4", "group:32", "mse", "e3m4")])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float32_is_never_narrowed_and_gives_the_reference(ratio, kind, weights):
    layer, x = quantized(kind, torch.float32, weights=weights)
    with torch.no_grad():
        output = layer(x)
        with kernels.forced("reference"):
            assert torch.equal(output, layer(x))


def test_the_fast_dtype_holds_every_value_of_the_inputs(ratio):
    for dtype in (*HALVES, torch.float32, torch.float64):
        assert torch.finfo(fast_dtype.fast_dtype(dtype)).eps <= torch.finfo(dtype).eps
    assert fast_dtype.fast_dtype(torch.bfloat16) == (torch.float32 if ratio < 1 else torch.bfloat16)


def test_autocast_decides_for_itself(ratio):
    layer, x = quantized()
    for inputs in (x, x.float()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(inputs).dtype == torch.bfloat16


def test_a_bfloat16_layer_compiles_into_one_graph_in_either_dtype(ratio):
    layer, x = quantized()
    torch._dynamo.reset()  # what was compiled for the other machine
    with torch.no_grad():
        expected = layer(x)
        output = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(output, expected)


def test_the_pace_is_measured_once_a_machine(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(fast_dtype, "measured", lambda dtype: measured.append(dtype) or 0.5)

    def choose(dtype):  # as a new process does
        fast_dtype._ratio.cache_clear()
        return fast_dtype.fast_dtype(dtype)

    try:
        assert [choose(dtype) for dtype in (*HALVES, *HALVES)] == [torch.float32] * 4
        assert measured == HALVES
        (file,) = (tmp_path / "ratios").iterdir()
        assert json.loads(file.read_text()) == {"float32 / torch.bfloat16": 0.5, "float32 / torch.float16": 0.5}
        for damaged in ("{", "[]", '{"float32 / torch.bfloat16": "slow"}'):
            file.write_text(damaged)
            assert choose(torch.bfloat16) == torch.float32
        assert measured == HALVES + [torch.bfloat16] * 3
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        choose(torch.bfloat16)
        assert len(measured) == 6, "the pace of other instructions is another"
        monkeypatch.setenv("DMQUANT_CACHE", str(file))
        choose(torch.bfloat16)
        assert len(measured) == 7, "without a folder to write to it is measured in each process"
    finally:
        fast_dtype._ratio.cache_clear()


def test_layers_share_memory_for_a_call_and_no_longer():
    (first, x), (second, _) = (quantized(dtype=torch.float32, activations=None, seed=seed) for seed in range(2))
    with torch.no_grad():
        expected = first(x), second(x)
        weight = first.dequantize(torch.float32)
        kept = weight.clone()
        assert torch.equal(second(x), expected[1])
        assert torch.equal(weight, kept)
    learnt = x.clone().requires_grad_()
    output = first(learnt)
    with torch.no_grad():
        second(x)
    output.sum().backward()
    torch.testing.assert_close(learnt.grad, kept.sum(0).expand_as(x))


def test_threads_do_not_share_it():
    layers = [quantized(dtype=torch.float32, seed=seed)[0] for seed in range(2)]
    x = quantized(dtype=torch.float32)[1]
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
    differing = []

    def call(layer, output):
        with torch.no_grad():
            differing.extend(turn for turn in range(200) if not torch.equal(layer(x), output))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_without_a_compiler_weights_are_looked_up(monkeypatch):
    layer, x = quantized(dtype=torch.float32, weights=("nvfp4",))
    with torch.no_grad():
        expected, weight = layer(x), layer.dequantize(torch.bfloat16)
    monkeypatch.setattr(expanding, "library", lambda name: None)
    expanding._compiled.cache_clear()
    try:
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer.dequantize(torch.bfloat16), weight)
    finally:
        expanding._compiled.cache_clear()


def test_many_rows_are_expanded_by_several_threads_alike():
    layer = quantize_layer(nn.Linear(512, 1000), WeightSpec.parse("fp4", store="pow2"), None)
    assert layer.weight_shape[0] * layer.weight_shape[1] >= expanding.WORTH_THREADS
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        weight = layer.dequantize(torch.float32)
    finally:
        torch.set_num_threads(before)
    with kernels.forced("reference"):
        layer.drop_kernel_weights()
        assert torch.equal(weight, layer.dequantize(torch.float32))
