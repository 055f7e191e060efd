"""Quantized layers compute what packed weights and quantized inputs say, and remain Linear and Conv2d to others."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmquant import kernels
from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.convert import quantize_
from dmquant.diffusers.timesteps import share_timesteps
from dmquant.errors import UsageError
from dmquant.layers import QuantConv2d, QuantLinear, quantize_layer
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.recipe import Recipe

FP4, FP6 = WeightSpec.parse("fp4"), ActivationSpec.parse("fp6")
ACTIVATIONS = [None, FP6, ActivationSpec.parse("int8", "tensor"), ActivationSpec.parse("mxfp6")]


@pytest.mark.parametrize(
    "activations", [None, FP6, ActivationSpec.parse("int8", "tensor"), ActivationSpec.parse("mxfp6")]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_its_dequantized_weight_on_quantized_inputs(activations, bias, dtype):
    """Other kernels round less where the input is narrow: tests/kernels/test_floating.py."""
    layer = nn.Linear(200, 96, bias=bias).to(dtype)
    quantized = quantize_layer(layer, FP4, activations)
    x = torch.randn(2, 7, 200, dtype=dtype)
    inputs = x if activations is None else fake_quantize(x, activations)
    weight = quantize_tensor(layer.weight, "fp4").dequantize(dtype)
    with kernels.forced("reference"):
        assert torch.equal(quantized(x), F.linear(inputs, weight, layer.bias))
    assert quantized(x).dtype == dtype


@pytest.mark.parametrize("activations", [None, FP6])
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"groups": 4},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (0, 2), "bias": False},
    ],
)
def test_convolution_is_its_dequantized_weight_on_quantized_inputs(activations, geometry):
    layer = nn.Conv2d(12, 8, 3, **geometry)
    quantized = quantize_layer(layer, FP4, activations)
    x = torch.randn(2, 12, 9, 10)
    inputs = x if activations is None else fake_quantize(x, activations, dim=1)
    float_twin = copy.deepcopy(layer)
    float_twin.weight.data = quantize_tensor(layer.weight, "fp4").dequantize()
    assert torch.equal(quantized(x), float_twin(inputs))
    assert quantized(x[0]).shape == quantized(x)[0].shape  # unbatched, as nn.Conv2d


@pytest.mark.parametrize(
    ("format", "most"), [("fp8", 0.04), ("fp6", 0.04), ("fp4", 0.13), ("int8", 0.01), ("nvfp4", 0.12)]
)
def test_more_bits_stay_closer_to_the_float_layer(format, most):
    layer = nn.Linear(256, 128)
    x = torch.randn(64, 256)
    quantized = quantize_layer(layer, WeightSpec.parse(format), None)
    assert (quantized(x) - layer(x)).norm() / layer(x).norm() < most


def test_layers_hold_only_packed_bytes_and_bias():
    quantized = quantize_layer(nn.Linear(256, 32).bfloat16(), FP4, FP6)
    assert {name: p.dtype for name, p in quantized.named_parameters()} == {
        "qweight": torch.uint8,
        "scale": torch.uint8,
        "bias": torch.bfloat16,
    }
    assert sum(p.nbytes for p in quantized.parameters()) == 256 * 32 * 4.25 / 8 + 32 * 2
    assert not list(quantized.buffers())


@pytest.mark.parametrize("activations", ["nvfp4", "mxfp6", "int8"])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(60, 8), (0, 60)), (nn.Linear(60, 8), (2, 0, 60)), (nn.Conv2d(24, 8, 3, padding=1), (0, 24, 4, 4))],
)
def test_an_empty_batch_goes_through(activations, kernel, layer, shape):
    quantized = quantize_layer(layer, WeightSpec.parse("fp4"), ActivationSpec.parse(activations))
    with kernels.forced(kernel):
        assert quantized(torch.zeros(shape)).shape == layer(torch.zeros(shape)).shape


@pytest.mark.parametrize("format", ["fp4", "nvfp4", "mxfp4", "int4"])
def test_casting_the_module_changes_no_code_and_no_scale(format):
    quantized = quantize_layer(nn.Linear(96, 64), WeightSpec.parse(format, store="fp32"), None)
    before = quantized.dequantize(torch.float32)
    quantized.half().to(torch.bfloat16)
    assert quantized.bias.dtype == torch.bfloat16
    assert torch.equal(quantized.dequantize(torch.float32), before)


def test_copies_and_pickles_give_the_same_output():
    quantized = quantize_layer(nn.Conv2d(8, 8, 3), FP4, FP6)
    x = torch.randn(1, 8, 6, 6)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    for twin in (copy.deepcopy(quantized), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), quantized(x))


def test_state_dict_fills_an_empty_layer():
    layer = nn.Linear(100, 40)
    quantized = quantize_layer(layer, FP4, FP6)
    empty = QuantLinear.like(layer, FP4, FP6, device="meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    x = torch.randn(3, 100)
    assert torch.equal(empty(x), quantized(x))


def test_the_first_parameter_is_of_the_layers_dtype():
    """SDXL casts its latents to that of `vae.post_quant_conv`."""
    layer = nn.Conv2d(4, 4, 1).bfloat16()
    quantized = quantize_layer(layer, FP4, None)
    empty = QuantConv2d.like(layer, FP4, None, device="meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    for one in (quantized, empty, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert next(one.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_input_that_was_cast_to_integers_is_refused(bias):
    quantized = quantize_layer(nn.Linear(16, 8, bias=bias), FP4, FP6)
    with pytest.raises(TypeError, match=r"takes floating point, not torch\.uint8"):
        quantized(torch.ones(2, 16, dtype=torch.uint8))


def test_subclasses_count_as_linear_and_convolution():
    assert isinstance(quantize_layer(nn.Linear(8, 8), FP4, None), nn.Linear)
    conv = quantize_layer(nn.Conv2d(8, 8, 1), FP4, None)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(conv, QuantConv2d)
    assert conv.weight.shape == (8, 8, 1, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(24, 8), nn.Conv2d(24, 8, 3)])
def test_a_layer_keeps_the_dtype_of_the_float_layer(layer, bias):
    layer = copy.deepcopy(layer)
    layer.bias = layer.bias if bias else None
    quantized = quantize_layer(layer.bfloat16(), FP4, None)
    assert quantized.weight.dtype == quantized.weight.data.dtype == torch.bfloat16
    empty = type(quantized).like(layer, FP4, None, device="meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    for one in (empty, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert one.weight.dtype == torch.bfloat16
    assert quantized.half().weight.dtype == torch.float16
    assert quantized.to("cpu").weight.dtype == torch.float16
    assert not list(quantized.buffers())


def test_looking_at_a_weight_from_outside_decodes_nothing(monkeypatch):
    quantized = quantize_layer(nn.Linear(24, 8, bias=False).half(), FP4, None)
    exact = quantized.weight.data

    def decode(*args):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "dequantize", decode)
        weight = quantized.weight
        assert (weight.shape, weight.dtype, weight.device) == ((8, 24), torch.float16, torch.device("cpu"))
        assert (weight.ndim, weight.numel(), weight.size(1), len(weight)) == (2, 192, 24, 8)
        assert isinstance(weight, torch.Tensor)
        assert weight.is_floating_point()
        with pytest.raises(AssertionError, match="decoded"):
            weight.sum()
    for plain in (weight.detach(), torch.cat([weight]), weight.double(), copy.deepcopy(weight), weight * 1, weight[:]):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain.half(), exact)
    assert torch.equal(weight.to("cpu"), exact)
    assert weight.tolist() == exact.tolist()
    assert (weight.numpy() == exact.numpy()).all()
    assert torch.equal(pickle.loads(pickle.dumps(weight)), exact)


def add_to_data(weight):
    weight.data += 1


def test_a_weight_is_no_place_to_write_to():
    layer = nn.Linear(24, 8)
    with torch.no_grad():
        weight = quantize_layer(layer, FP4, None).weight
    for spec in (FP4, WeightSpec.parse("fp4", split=6)):
        with pytest.raises(RuntimeError, match="keep the LoRA unfused"):
            add_to_data(quantize_layer(layer, spec, None).weight)
    for write in (lambda: weight.add_(1), lambda: weight.copy_(torch.zeros(8, 24)), lambda: setattr(weight, "data", 0)):
        with pytest.raises(RuntimeError, match="cannot be written to"):
            write()


def test_gradients_reach_the_input_for_adapters_below():
    quantized = quantize_layer(nn.Linear(32, 8), FP4, None)
    x = torch.randn(4, 32, requires_grad=True)
    quantized(x).sum().backward()
    assert torch.allclose(x.grad, quantized.dequantize(torch.float32).sum(0).expand(4, -1), atol=1e-6)


LAYERS = {
    "linear": (lambda: nn.Linear(32, 8), (4, 5, 32)),
    "no bias": (lambda: nn.Linear(32, 8, bias=False), (4, 32)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=2), (2, 8, 9, 11)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 9, 9)),
    "reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9)),
    "same": (lambda: nn.Conv2d(8, 6, 3, padding="same"), (2, 8, 9, 9)),
    "no batch": (lambda: nn.Conv2d(8, 6, 3), (8, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("transforms", [(), ("rotate", "lowrank")])
def test_gradients_go_straight_through_the_rounding_of_inputs(kind, transforms):
    if transforms and kind == "groups":
        pytest.skip("low-rank branches are not for grouped convolutions")
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    recipe = Recipe(name="test", keep="none", weights="fp4", activations="fp6", transforms=list(transforms))
    layer = nn.Sequential(build())
    quantize_(layer, recipe)
    quantized = layer[0]
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn_like(quantized(x))
    quantized(x).backward(upstream)
    own = x.detach().clone().requires_grad_()
    *given, y = quantized.inputs(own)
    rounded = y + (quantized.quantize_input(y) - y).detach()
    weight = quantized.dequantize(torch.float32)
    is_linear = isinstance(quantized, nn.Linear)
    out = F.linear(rounded, weight) if is_linear else quantized._conv_forward(rounded, weight, None)
    quantized.complete_output(out, given).backward(upstream)
    assert torch.allclose(x.grad, own.grad, atol=1e-4)


def test_a_quantized_layer_keeps_no_activations_for_its_gradient_and_its_bias_may_learn():
    quantized = quantize_layer(nn.Linear(256, 128), FP4, FP6)
    quantized.bias.requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda nothing: nothing):
        y = quantized(torch.randn(64, 256, requires_grad=True))
    assert not kept
    y.sum().backward()
    assert torch.equal(quantized.bias.grad, torch.full((128,), 64.0))


def test_the_reference_kernels_can_be_forced_and_agree():
    quantized = quantize_layer(nn.Linear(128, 64), FP4, FP6)
    x = torch.randn(5, 128)
    fast = quantized(x)
    with kernels.forced("reference"):
        assert torch.equal(quantized(x), fast)


@pytest.mark.slow
def test_torch_compile_agrees_with_eager():
    quantized = quantize_layer(nn.Linear(128, 64), FP4, FP6)
    x = torch.randn(5, 128)
    assert torch.allclose(torch.compile(quantized)(x), quantized(x), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    for layer, x in ((nn.Linear(128, 64), torch.randn(5, 128)), (nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9))):
        quantized = quantize_layer(layer, FP4, FP6)
        expected = quantized(x)
        on_gpu = quantized.cuda()
        assert torch.equal(
            on_gpu.dequantize(torch.float32).cpu(), quantize_layer(layer, FP4, FP6).dequantize(torch.float32)
        )
        assert torch.allclose(on_gpu(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)


class TestLora:
    """LoRA adapters (peft) on quantized layers."""

    def adapted(self):
        peft = pytest.importorskip("peft")

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.to_q = quantize_layer(nn.Linear(64, 64), FP4, None)
                self.conv = quantize_layer(nn.Conv2d(8, 8, 3), FP4, None)

            def forward(self, x):
                return self.to_q(x)

        base = Model()
        config = peft.LoraConfig(target_modules=["to_q", "conv"], r=4, init_lora_weights=False)
        return peft.get_peft_model(base, config)

    def test_an_adapter_changes_the_output_and_can_be_disabled(self):
        model, x = self.adapted(), torch.randn(3, 64)
        with model.disable_adapter():
            plain = model(x)
        lora = model.base_model.model.to_q
        delta = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
        assert torch.allclose(model(x), plain + delta, atol=1e-5)

    @pytest.mark.parametrize("safe", [True, False])
    def test_fusing_is_a_clear_error_instead_of_a_lost_adapter(self, safe):
        with pytest.raises(RuntimeError, match="keep the LoRA unfused"):
            self.adapted().merge_adapter(safe_merge=safe)


class TestStatic:
    """Layers whose input scales calibration fixed, one set for each timestep range."""

    TENSOR, CHANNEL = (
        ActivationSpec.parse("fp6", granularity, scale="static:4") for granularity in ("tensor", "channel")
    )

    class Model(nn.Module):
        """A convolution, a linear and a layer that is quantized online, as one recipe may mix them."""

        def __init__(self, tensor, channel):
            super().__init__()
            self.conv = quantize_layer(nn.Conv2d(6, 8, 3, padding=1), FP4, channel, input_scale=torch.rand(4, 6) + 0.05)
            self.linear = quantize_layer(nn.Linear(8, 8), FP4, tensor, input_scale=torch.rand(4, 1) + 0.05)
            self.online = quantize_layer(nn.Linear(8, 8), FP4, FP6)

        def forward(self, x):
            return self.online(self.linear(self.conv(x).flatten(2).mT))

    def model(self):
        model = self.Model(self.TENSOR, self.CHANNEL)
        return model, share_timesteps(model)

    def test_a_mixed_batch_is_its_rows_one_by_one(self):
        model, ranges = self.model()
        x, timesteps = torch.randn(5, 6, 4, 4), torch.tensor([10, 400, 990, 300, 600])
        ranges.set(timesteps)
        together = model(x)
        for row, timestep in enumerate(timesteps):
            ranges.set(timestep)
            assert torch.equal(model(x[row : row + 1]), together[row : row + 1])
        ranges.set(timesteps.flip(0))
        assert not torch.equal(model(x), together)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_layer_is_its_weight_on_inputs_quantized_by_its_scale(self, dtype):
        layer, scale = nn.Linear(16, 8).to(dtype), torch.rand(1, 16) + 0.05
        spec = ActivationSpec.parse("fp6", "channel", scale="static:1")
        quantized = quantize_layer(layer, FP4, spec, input_scale=scale)
        x = torch.randn(3, 5, 16, dtype=dtype)
        inputs = fake_quantize(x, spec, scale=scale)
        with kernels.forced("reference"):
            assert torch.equal(quantized(x), F.linear(inputs, quantized.dequantize(dtype), layer.bias))

    def test_casting_keeps_the_scales(self):
        model, _ = self.model()
        before = model.conv.input_scale.clone()
        model.half().to(torch.bfloat16)
        assert torch.equal(model.conv.input_scale, before)
        assert before.dtype == torch.uint8
        assert before.numel() == 4 * 6 * 4

    def test_a_copy_looks_up_timesteps_of_its_own(self):
        model, ranges = self.model()
        x = torch.randn(2, 6, 4, 4)
        ranges.set(900)
        expected = model(x)
        twin = copy.deepcopy(model)
        twin.conv.timestep_ranges.set(0)
        assert twin.conv.timestep_ranges is twin.linear.timestep_ranges
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)

    def test_offloaded_weights_give_the_same_output(self):
        accelerate = pytest.importorskip("accelerate")
        model, ranges = self.model()
        x = torch.randn(2, 6, 4, 4)
        ranges.set(torch.tensor([100, 800]))
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.conv.input_scale.is_meta
        assert torch.equal(model(x), expected)

    def test_one_graph_holds_for_every_timestep(self):
        model, ranges = self.model()
        graphs = []

        def count(graph, example_inputs):
            graphs.append(graph)
            return graph

        compiled, x = torch.compile(model, backend=count, fullgraph=True), torch.randn(2, 6, 4, 4)
        for timesteps in ([5, 5], [990, 300], [300, 600]):
            ranges.set(torch.tensor(timesteps))
            assert torch.equal(compiled(x), model(x))
        assert len(graphs) == 1

    def test_without_fitted_scales_there_is_no_static_layer(self):
        with pytest.raises(UsageError, match="fitted to calibration data"):
            quantize_layer(nn.Linear(8, 8), FP4, self.TENSOR)

    def test_models_without_several_ranges_share_nothing(self):
        one = ActivationSpec.parse("fp6", "tensor", scale="static:1")
        single = quantize_layer(nn.Linear(8, 8), FP4, one, input_scale=torch.ones(1, 1))
        assert share_timesteps(nn.Sequential(single, quantize_layer(nn.Linear(8, 8), FP4, FP6))) is None
