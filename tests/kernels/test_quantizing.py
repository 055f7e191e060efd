"""The compiled way to quantize without data: the definition's codes and scales bit for bit, or else the slower way."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant import qtensor
from dmquant.convert import relative_error
from dmquant.cpu import compiling, quantizing
from dmquant.errors import UsageError
from dmquant.formats import known_formats
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec, quantize
from dmquant.scaling import to_matrix

needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="needs a C++ compiler")
FORMATS = [*(name for name in known_formats() if not name.startswith("lut4")), "fp3_e1m1", "fp8_e6m1"]


@pytest.fixture
def anew(monkeypatch):
    """Nothing is known yet of this machine, this process and what they can do."""
    monkeypatch.setattr(quantizing, "_seen", 0)
    cached = [compiling.library, compiling._made, compiling._compiler, compiling.missing_compiler]
    cached += [compiling._note, quantizing._functions, quantizing._checked_width]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@st.composite
def cases(draw):
    """A weight with its specification: any layout of groups, and magnitudes up to float32's ends."""
    rows, channels = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    kernel = draw(st.sampled_from([(), (), (1, 1), (3, 2)]))
    granularity = draw(st.just("channel") | st.sampled_from([16, 32, 64, *range(1, 160)]).map("group:{}".format))
    split = draw(st.none() | st.integers(1, channels - 1)) if channels > 1 else None
    rule, store = draw(st.sampled_from(["mse", "absmax"])), draw(st.sampled_from(list(quantizing._OWN_STORES)))
    spec = WeightSpec.parse(draw(st.sampled_from(FORMATS)), granularity, rule, store, split)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(rows, channels, *kernel, generator=seed) * 2.0 ** draw(st.integers(-148, 120))
    if draw(st.booleans()):  # so that ties abound
        weight = (weight / weight.abs().max().clamp(min=1e-38) * draw(st.sampled_from([12, 127, 250]))).round() / 2
    spread = draw(st.sampled_from([0.0, 3.0, 20.0]))
    weight *= torch.logspace(-spread, 0, channels).view(-1, *[1] * len(kernel))
    weight[torch.rand(rows, generator=seed) < 0.1] = 0
    weight = weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))
    return weight.nan_to_num(0, 0, 0), spec  # float16 holds less


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_codes_and_scales_are_those_of_the_definition_bit_for_bit(case):
    weight, spec = case
    matrix = to_matrix(weight, spec.split)
    assert quantizing._takes(spec, matrix)
    codes, scales = quantizing._fit_and_round(matrix, spec, weight.shape, quantizing._checked_width())
    expected, as_stored = qtensor.fit_and_round(matrix, spec, weight.shape)
    assert torch.equal(scales.stored.view(torch.uint8), as_stored.stored.view(torch.uint8))
    assert torch.equal(codes, expected)
    assert (scales.base is None) == (as_stored.base is None)
    assert scales.base is None or torch.equal(scales.base, as_stored.base)


@needs_compiler
@pytest.mark.parametrize("size", [16, 64, 1100, 4608])
def test_long_groups_and_many_threads_give_the_same(size):
    weight = torch.randn(70, 9216, generator=torch.Generator().manual_seed(size))
    spec, threads = WeightSpec.parse("fp4", f"group:{size}", "mse", "e4m3"), torch.get_num_threads()
    width = quantizing._checked_width()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            codes, scales = quantizing._fit_and_round(weight, spec, weight.shape, width)
    finally:
        torch.set_num_threads(threads)
    expected, as_stored = qtensor.fit_and_round(weight, spec, weight.shape)
    assert torch.equal(codes, expected)
    assert torch.equal(scales.stored, as_stored.stored)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(bad, dtype):
    weight = torch.randn(40, 100).to(dtype)
    weight[33, 99] = bad
    with pytest.raises(UsageError, match="NaN or infinity"):
        quantizing._fit_and_round(weight, WeightSpec.parse("fp4"), weight.shape, 8)


@needs_compiler
@pytest.mark.parametrize("layer", [nn.Linear(100, 40), nn.Conv2d(12, 20, 3), nn.Linear(64, 30).bfloat16()])
@pytest.mark.parametrize("spec", [("fp4", "group:16", "mse", "e4m3"), ("fp6", "tensor"), ("lut4", "group:7")])
def test_the_error_of_a_layer_is_what_its_decoded_weight_says(layer, spec):
    assert quantizing._checked_width()
    quantized, exact = quantize_layer(layer, WeightSpec.parse(*spec), None), layer.weight.detach().double()
    expected = (quantized.float_weight().double() - exact).square().sum() / exact.square().sum()
    assert quantizing.relative_error(layer.weight.detach(), quantized) == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(layer.weight, quantized) == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_compiler_one_note_says_so_and_codes_are_the_same(anew, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "_compiler", lambda: None)
    monkeypatch.setattr(quantizing, "PAYS_AFTER", 0)
    weight, spec = torch.randn(20, 64), WeightSpec.parse("fp4", scale="mse")
    with caplog.at_level(logging.WARNING, "dmquant"):
        first, again = quantize(weight, spec), quantize(weight, spec)
    assert len(caplog.records) == 1
    assert "a C++ compiler: install g++ or clang; slower code does the work" in caplog.text
    assert torch.equal(first.codes, qtensor.fit_and_round(weight, spec, weight.shape)[0])
    assert torch.equal(first.codes, again.codes)


@needs_compiler
def test_it_is_compiled_once_it_pays(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(quantizing, "PAYS_AFTER", 3000)
    monkeypatch.setattr(quantizing, "_checked_width", lambda: asked.append(True))
    asked, weight, spec = [], torch.randn(20, 64), WeightSpec.parse("fp4", scale="mse")
    for _ in range(3):
        quantize(weight, spec)
    assert len(asked) == 1
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_library_that_differs_is_not_used(anew, monkeypatch, caplog):
    monkeypatch.setattr(quantizing, "OCTAVES_BELOW", 13)
    with caplog.at_level(logging.WARNING, "dmquant"):
        assert quantizing._checked_width() is None
    assert "the compiled one differs here" in caplog.text
