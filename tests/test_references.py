"""Methods against code of others, brevitas and torchao, on the same weights, inputs and scales.

Neither belongs in the environment of the other tests: brevitas asks for a setuptools below 81, and where torchao is
installed, diffusers imports it at every start and warns. `.ci/run` installs both apart and runs this file alone.
Not here: gptqmodel 7.7, which asks for torch 2.14, and torchao's own GPTQ, which asks for CUDA.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

APART = "installed apart from what the other tests need, see .ci/run"
pytest.importorskip("brevitas", reason=APART)
pytest.importorskip("torchao", reason=APART)

import brevitas.nn as qnn
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.equalize import EqualizeGraph, activation_equalization_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.hadamard import matmul_hadU
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant.float_base import Fp4e2m1Mixin, Fp6e2m3Mixin, ScaledFloatWeightBase
from brevitas.quant.float_quant_ocp import FpOCPWeight, FpOCPWeightPerChannelFloat, FpOCPWeightPerChannelFloatMSE
from brevitas.quant.mx_quant_ocp import GroupwiseWeightFloatProxyMixin, MXFloat8e4m3Weight
from brevitas_examples.common.svd_quant import LayerwiseLowRankCorrection
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.mx_formats.utils import to_blocked
from torchao.prototype.smoothquant.core import SmoothQuantObserver
from torchao.prototype.spinquant.hadamard_utils import hadamard_matrix

from dmquant.activations import ActivationSpec, TimestepRanges, fake_quantize
from dmquant.calib.layers.correction import correct
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import fit_grid
from dmquant.calib.layers.statistics import InputObserver
from dmquant.convert import LayerPlan
from dmquant.formats import get_format
from dmquant.gpu import blocked
from dmquant.layers import QUANTIZED, quantize_layer
from dmquant.packing import unpack
from dmquant.qtensor import WeightSpec, quantize, quantize_tensor, to_matrix
from dmquant.rounding import gptq, nearest
from dmquant.scaling import Scales, absmax, fit_mse, to_groups
from dmquant.transforms import create, fit_of
from dmquant.transforms.equalize import equalizing
from dmquant.transforms.pair import Pair
from dmquant.transforms.rotate import hadamard

ULP = 2.0**-23
BFLOAT16 = 2.0**-8  # how far rounding to bfloat16 goes
FIXED = "parameter_from_stats"  # a scale from the weight as it was, not from one that GPTQ moved


class Int4(Int8WeightPerChannelFloat):
    bit_width = 4
    narrow_range = False
    scaling_impl_type = FIXED


class Fp4(Fp4e2m1Mixin, FpOCPWeightPerChannelFloat):
    scaling_impl_type = FIXED


class Fp4Groups(GroupwiseWeightFloatProxyMixin, Fp4e2m1Mixin, FpOCPWeight, ScaledFloatWeightBase):
    scaling_per_output_type = "group"
    group_size = 16
    scaling_impl_type = FIXED


class MX(MXFloat8e4m3Weight):
    scaling_impl_type = FIXED


class MX6(MX):
    bit_width, exponent_bit_width, mantissa_bit_width = 6, 2, 3


class MX4(MX):
    bit_width, exponent_bit_width, mantissa_bit_width = 4, 2, 1


class Fp4MSE(Fp4e2m1Mixin, FpOCPWeightPerChannelFloatMSE):
    pass


class Fp6MSE(Fp6e2m3Mixin, FpOCPWeightPerChannelFloatMSE):
    pass


def weight_of(*shape, seed=0):
    """Normal times log-normal rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(shape, generator=generator) * rows.exp()


def inputs_of(*shape, seed=1):
    """Two batches with few directions in their last dimension, of which the first are the largest."""
    generator, columns = torch.Generator().manual_seed(seed), shape[-1]
    directions = torch.randn(columns // 8, columns, generator=generator)
    x = torch.randn(2, *shape[:-1], columns // 8, generator=generator) @ directions
    return (x + 0.2 * torch.randn(2, *shape, generator=generator)) * torch.logspace(1, -1, columns) + 0.1


def in_brevitas(layer, quantizer):
    """A layer of brevitas with the same weight and bias."""
    rows, columns, *kernel = layer.weight.shape
    settings = {"bias": layer.bias is not None, "weight_quant": quantizer}
    one = qnn.QuantConv2d(columns, rows, kernel, **settings) if kernel else qnn.QuantLinear(columns, rows, **settings)
    one = one.to(layer.weight.dtype).eval().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        getattr(one, name).data = parameter.data.clone()
    return one


def layer_of(weight, bias=None):
    """A linear layer or a convolution."""
    rows, columns, *kernel = weight.shape
    layer = nn.Conv2d(columns, rows, kernel) if kernel else nn.Linear(columns, rows)
    layer.weight.data = weight.clone()
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
    return layer.requires_grad_(False)


@pytest.mark.parametrize("shape", [(128, 4), (5, 3), (300, 72)])
def test_blocked_scales_are_in_torchaos_order(shape):
    scales = torch.randint(0, 120, shape, dtype=torch.uint8)
    theirs = to_blocked(scales.view(torch.float8_e4m3fn)).view(torch.uint8).flatten()
    assert torch.equal(blocked.to_blocked(scales), theirs)


class TestGPTQ:
    """Against brevitas: the same scales, inputs and damping."""

    def solved(self, layer, quantizer, x, order):
        """Quantized by brevitas, its scales, both as matrices in the order of the codes."""
        theirs = in_brevitas(layer, quantizer)
        theirs.quant_weight()  # fixes the scales
        settings = {"act_order": order == "activation", "num_blocks": 3, "dtype": layer.weight.dtype}
        with torch.no_grad(), gptq_mode(nn.Sequential(theirs), **settings) as mode:
            for batch in x:
                mode.model(batch.to(layer.weight.dtype))
            mode.update()
        found = theirs.quant_weight()
        return to_matrix(found.value), to_matrix(found.scale.expand_as(found.value))

    def grid(self, layer, format, granularity, scale):
        """The layer's weight under these scales, (rows, columns), as dmquant rounds it."""
        spec = WeightSpec.parse(format, granularity, "absmax", "fp32")
        size = spec.granularity.size or scale.shape[1]
        scales = Scales(scale[:, ::size].float().contiguous(), None, "fp32")
        return spec.grid_type(to_matrix(layer.weight.float()), spec, scales, tuple(layer.weight.shape))

    def codes(self, grid, values, scale):
        return grid.spec.fmt.round(values / scale)

    @pytest.mark.parametrize("order", ["activation", "given"])
    @pytest.mark.parametrize(
        ("quantizer", "format", "granularity"),
        [
            (Int4, "int4", "channel"),
            (Fp4, "fp4", "channel"),
            (Fp4Groups, "fp4", "group:16"),
            (MX4, "fp4", "group:32"),
        ],
    )
    def test_in_float64_every_code_of_a_linear_layer_is_the_same(self, quantizer, format, granularity, order):
        layer, x = layer_of(weight_of(24, 160).double()), inputs_of(200, 160).double()
        theirs, scale = self.solved(layer, quantizer, x, order)
        grid, columns = self.grid(layer, format, granularity, scale), x.flatten(0, 1)
        moments = columns.T @ columns / len(columns)
        ours, _ = gptq.solve(grid, gptq.factorize([moments], gptq.Options(order=order)))
        assert torch.equal(self.codes(grid, ours, scale), self.codes(grid, theirs, scale))
        assert (ours != grid.nearest).float().mean() > 0.05

    @pytest.mark.parametrize("order", ["activation", "given"])
    @pytest.mark.parametrize(("quantizer", "format"), [(Int4, "int4"), (Fp4, "fp4")])
    def test_in_float32_too(self, quantizer, format, order):
        """The sums round differently, which changes a code where a moved weight lies between two values."""
        layer, x = layer_of(weight_of(24, 160)), inputs_of(200, 160)
        theirs, scale = self.solved(layer, quantizer, x, order)
        grid, columns = self.grid(layer, format, "channel", scale), x.flatten(0, 1)
        moments = columns.T @ columns / len(columns)
        ours, _ = gptq.solve(grid, gptq.factorize([moments], gptq.Options(order=order)))
        same = self.codes(grid, ours, scale) == self.codes(grid, theirs, scale)
        losses = [(((values - grid.weight) @ moments) * (values - grid.weight)).sum() for values in (ours, theirs)]
        assert same.float().mean() >= 0.99
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)

    @pytest.mark.parametrize(("quantizer", "format"), [(Int4, "int4"), (Fp4, "fp4")])
    def test_in_float64_every_code_of_a_convolution_is_the_same(self, quantizer, format):
        """In the order of activations; the given orders differ, channels first there and last here."""
        layer = layer_of(weight_of(24, 16, 3, 3).double())
        x = inputs_of(2, 8, 8, 16).movedim(-1, 2).double()
        theirs, scale = self.solved(layer, quantizer, x, "activation")
        grid = self.grid(layer, format, "channel", scale)
        patches = F.unfold(x.flatten(0, 1), 3).transpose(1, 2).reshape(-1, 16, 3, 3)
        columns = to_matrix(patches)
        ours, _ = gptq.solve(grid, gptq.factorize([columns.T @ columns / len(columns)], gptq.Options()))
        assert torch.equal(self.codes(grid, ours, scale), self.codes(grid, theirs, scale))
        assert (ours != grid.nearest).float().mean() > 0.05

    def test_columns_that_no_input_reaches_are_zero_there_and_nearest_here(self):
        layer, x = layer_of(weight_of(24, 160).double()), inputs_of(200, 160).double()
        x[..., ::5] = 0
        theirs, scale = self.solved(layer, Fp4, x, "activation")
        grid, columns = self.grid(layer, "fp4", "channel", scale), x.flatten(0, 1)
        ours, _ = gptq.solve(grid, gptq.factorize([columns.T @ columns / len(columns)], gptq.Options()))
        assert not theirs[:, ::5].any()
        assert torch.equal(ours[:, ::5], grid.nearest[:, ::5])


class TestBlockFormats:
    """Codes and scales of MX and NVFP4."""

    def weight(self):
        """Groups of unlike size, of zeros, of midpoints between values, and clipped ones."""
        weight = weight_of(48, 256)
        weight[0, :32] = 0
        weight[1, :32] = torch.arange(-16, 16) / 4
        weight[2, :32] = torch.linspace(-7.9, 7.9, 32)
        weight[3] *= 1e-30
        weight[4] *= 1e30
        return weight

    @pytest.mark.parametrize(
        ("format", "dtype"),
        [
            ("fp4_e2m1", torch.float4_e2m1fn_x2),
            ("fp6_e2m3", DTYPE_FP6_E2M3),
            ("fp6_e3m2", DTYPE_FP6_E3M2),
            ("fp8_e4m3", torch.float8_e4m3fn),
            ("fp8_e5m2", torch.float8_e5m2),
        ],
    )
    def test_mx_is_that_of_torchao_bit_for_bit(self, format, dtype):
        """Codes, scales and values by the floor rule, of weights and of activations."""
        weight = self.weight()
        ours = quantize(weight, WeightSpec.parse(format, "group:32", "absmax", "e8m0"))
        theirs = MXTensor.to_mx(weight, dtype, 32)
        codes = unpack_uint4(theirs.qdata) if format == "fp4_e2m1" else theirs.qdata.view(torch.uint8)
        assert torch.equal(unpack(ours.codes, ours.spec.fmt.bits, 256), codes)
        assert torch.equal(ours.dequantize(), theirs.dequantize(torch.float32))
        stored = theirs.scale.view(torch.uint8)
        assert (ours.scales.stored[0, 0], stored[0, 0]) == (1, 0)  # of zeros the smallest normal, and 2^-127
        assert torch.equal(ours.scales.stored.flatten()[1:], stored.flatten()[1:])
        activations = fake_quantize(weight, ActivationSpec.parse(format, "group:32", "e8m0"))
        assert torch.equal(activations, theirs.dequantize(torch.float32))

    @pytest.mark.parametrize(("format", "quantizer"), [("mxfp4", MX4), ("mxfp6", MX6), ("mxfp8", MX)])
    def test_mx_is_that_of_brevitas_bit_for_bit(self, format, quantizer):
        weight = weight_of(48, 256)
        ours, theirs = quantize_tensor(weight, format), in_brevitas(layer_of(weight), quantizer).quant_weight()
        assert torch.equal(ours.scale, theirs.scale[:, ::32])
        assert torch.equal(ours.dequantize(), theirs.value)

    def test_nvfp4_is_that_of_torchao_but_for_tiny_groups_and_ties(self):
        """Its group scales end at the smallest normal E4M3, 2^-6, ours at the smallest of all, 2^-9; it multiplies by a
        rounded reciprocal, which may decide otherwise within an ulp or two of a midpoint."""
        weight = weight_of(48, 256)
        weight[:4] *= 1e-3
        weight[:2] *= 1e-2
        ours = quantize_tensor(weight, "nvfp4")
        assert torch.allclose(ours.scales.base, per_tensor_amax_to_scale(weight.abs().max()), rtol=ULP, atol=0)
        theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=ours.scales.base.squeeze())
        scales = [get_format("fp8_e4m3").decode(one) for one in (ours.scales.stored, theirs.scale.view(torch.uint8))]
        tiny = scales[0] < 2.0**-6
        assert 0 < tiny.float().mean() < 0.2
        assert scales[0].min() == 2.0**-9
        assert torch.equal(scales[1], scales[0].clamp(min=2.0**-6))

        values, expected = (to_groups(one, ours.spec.granularity) for one in (ours.dequantize(), theirs.dequantize()))
        exact = to_groups(weight, ours.spec.granularity)
        lost = [(one - exact)[tiny].square().sum().item() for one in (values, expected)]
        assert lost[0] < lost[1]
        steps = exact.double() / ours.scale.double().unsqueeze(-1)
        points = ours.spec.fmt.values.double()
        tied = (steps.unsqueeze(-1) - (points[1:] + points[:-1]) / 2).abs().amin(-1) <= 4 * ULP * steps.abs()
        same = values == expected
        assert same[~tiny.unsqueeze(-1).expand_as(same) & ~tied].all()
        assert tied.float().mean() < 0.001


@pytest.mark.parametrize(("format", "quantizer"), [("fp4", Fp4MSE), ("fp6", Fp6MSE)])
def test_scales_of_least_weight_error_are_those_of_brevitas_or_better(format, quantizer):
    """There multiples of absmax up to 1 by 0.05, here beyond 1 too: the same scale where the best one is not beyond."""
    weight, fmt = weight_of(64, 256), get_format(format)
    theirs = in_brevitas(layer_of(weight), quantizer).quant_weight()
    ours = fit_mse(weight.unsqueeze(1), fmt, "fp32").decode()
    inside = ours <= absmax(weight.unsqueeze(1)) / fmt.max
    assert 0.3 < inside.float().mean() < 1
    assert torch.allclose(ours[inside], theirs.scale[inside], rtol=4 * ULP, atol=0)
    losses = [(one - weight).square().sum(1) for one in (fmt.round(weight / ours) * ours, theirs.value)]
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()


PAIRS = {"linear": lambda: nn.Linear(12, 16), "norm": lambda: nn.LayerNorm(16)}


@pytest.mark.parametrize("first", PAIRS)
def test_equalized_weights_are_those_of_brevitas(first):
    """One pass over one pair, ranges without the bias; a channel without range in the second layer stays."""
    torch.manual_seed(0)
    model = nn.Sequential(PAIRS[first](), nn.Linear(16, 10)).requires_grad_(False)
    model[0].weight.mul_(torch.logspace(-2, 2, 16).view(-1, *[1] * (model[0].weight.ndim - 1)))
    model[0].bias.normal_()
    model[1].weight[:, 3] = 0
    theirs = torch.fx.symbolic_trace(copy.deepcopy(model))
    theirs = EqualizeGraph(iterations=1, merge_bias=False, scale_computation_type="maxabs").apply(theirs)
    expected, ours = theirs.state_dict(), copy.deepcopy(model)
    pair = Pair((ours[0],), (ours[1],), 16)
    pair.scale_(pair.allowed(equalizing(pair)))
    assert ours.state_dict().keys() == expected.keys()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=4 * ULP, atol=0), name
    assert not torch.allclose(ours[0].weight, model[0].weight, rtol=0.5)
    assert torch.equal(ours[0].weight[3], model[0].weight[3])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_smoothing_factors_are_those_of_torchao_and_brevitas(alpha):
    """But for their rounding to bfloat16 here, and the 1e-7 that torchao adds to both ranges."""
    layer = layer_of(weight_of(24, 48) * torch.logspace(1, -1, 48))
    x = torch.randn(3, 4, 9, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 48)
    (smooth,) = create([("smooth", {"alpha": [alpha]})], layer, None)
    quantized = QUANTIZED[nn.Linear].like(layer, WeightSpec.parse("fp4"), None, "meta", (smooth,))
    observed = InputObserver(quantized, len(x))
    observer = SmoothQuantObserver(layer.weight, alpha)
    model = nn.Sequential(copy.deepcopy(layer))
    with activation_equalization_mode(model, alpha, layerwise=True, add_mul_node=True):
        for batch in x:
            observed.add(batch)
            observer(batch)
            model(batch)
    _, parts = fit_of(smooth).candidates(smooth, layer.weight, observed.statistics())
    factor = parts["factor"].float().flatten()
    for theirs in (1 / observer.calculate_qparams()[0], model[0].scale.weight.flatten()):
        assert torch.allclose(factor, theirs, rtol=BFLOAT16 + 1e-5, atol=0)
    assert torch.allclose(smooth.to_quantize(layer.weight, parts), model[0].layer.weight, rtol=BFLOAT16 + 1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "x"),
    [((24, 48), inputs_of(5, 9, 48)), ((24, 16, 3, 3), inputs_of(5, 8, 8, 16).movedim(-1, 2))],
    ids=["linear", "conv"],
)
def test_the_corrected_bias_is_that_of_brevitas(shape, x):
    """FP4 by channel, whose values are the same there, on the same inputs."""
    layer = layer_of(weight_of(*shape), torch.randn(24, generator=torch.Generator().manual_seed(0)))
    theirs = in_brevitas(layer, Fp4)
    theirs.quant_weight()
    with bias_correction_mode(nn.Sequential(theirs)):
        for batch in x:
            theirs(batch)

    transforms = create([("bias", {})], layer, None)
    step = LayerPlan("layer", WeightSpec.parse("fp4", "channel", "absmax", "fp32"), None, transforms=transforms)
    quantized = QUANTIZED[type(layer)].like(layer, step.weights, None, "meta", transforms)
    quantized.load_parts({"bias": fit_of(transforms[0]).candidates(transforms[0], layer.weight, None)[0]})
    grid = fit_grid(layer.weight, step, None)
    learner = Learner("layer", layer, grid, nearest.start(grid, nearest.Options()), quantized)

    def run_all():
        for batch in x:
            layer(batch)

    correct([learner], {"layer": grid.nearest}, float("inf"), TimestepRanges([1]), run_all, lambda: 0.0)
    table = quantized.parts(transforms[0])["table"][0]
    assert torch.equal(grid.as_weight(grid.nearest), theirs.quant_weight().value)
    assert torch.allclose(table, theirs.bias - layer.bias, rtol=1e-4, atol=1e-5 * table.abs().max().item())
    assert (table.abs() > 1e-3).any()


def test_the_low_rank_branch_is_that_of_brevitas_svdquant():
    """But for its rounding to bfloat16 here: the product of the factors, and what is left to quantize."""
    left, right = weight_of(64, 6), weight_of(6, 48, seed=1)
    layer = layer_of(left @ right + 0.1 * weight_of(64, 48, seed=2))
    (branch,) = create([("lowrank", {"rank": 6})], layer, None)
    (parts,) = fit_of(branch).candidates(branch, layer.weight, None)
    ours = parts["up"].float() @ parts["down"].float()
    model, _ = LayerwiseLowRankCorrection(nn.Sequential(in_brevitas(layer, Fp4))).apply(rank=6)
    theirs = model[0].correction.l2.weight @ model[0].correction.l1.weight
    assert (ours - theirs).norm() <= BFLOAT16 * theirs.norm()
    assert (branch.to_quantize(layer.weight, parts) - model[0].layer.weight).norm() <= BFLOAT16 * theirs.norm()
    assert theirs.norm() > 0.5 * layer.weight.norm()


def test_turns_of_the_low_rank_branch_end_where_those_of_brevitas_do():
    """Each turn on either side starts from codes that differ in single weights, so only where they end is compared."""
    layer = layer_of(weight_of(96, 64))
    errors = {}
    for turns in (0, 10):
        transforms = create([("lowrank", {"rank": 8, "iterations": turns})], layer, None)
        spec = WeightSpec.parse("fp4", "channel", "absmax", "fp32")
        ours = quantize_layer(layer, spec, None, transforms=transforms).float_weight()
        _, error = LayerwiseLowRankCorrection(nn.Sequential(in_brevitas(layer, Fp4))).apply(rank=8, iters=turns + 1)
        errors[turns] = (ours - layer.weight).norm() / layer.weight.norm(), error
    for ours, theirs in errors.values():
        assert ours.item() == pytest.approx(theirs.item(), rel=0.03)
    assert errors[10][0] < 0.95 * errors[0][0]


@pytest.mark.parametrize("size", [2, 8, 64, 256])
def test_the_hadamard_rotation_is_that_of_torchao_and_brevitas(size):
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hadamard(torch.eye(size), size, -1), hadamard_matrix(size, "cpu"), rtol=ULP, atol=0)
    assert torch.allclose(hadamard(x, size, -1), matmul_hadU(x), rtol=0, atol=8 * ULP)
