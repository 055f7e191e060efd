"""Inputs rounded as other engines round them, bit for bit, against their own functions on the CPU.

The packages are installed apart (see .ci/run); each test is skipped where its package cannot be imported.
"""

import pytest
import torch

from dmquant.activations import ActivationSpec, fake_quantize

APART = "installed apart from what the other tests need, see .ci/run"
DTYPES = (torch.bfloat16, torch.float32)
BASES = (0.37, 1.3e-3)  # of NVFP4 for the inputs below: one leaves many blocks below the smallest scale, one clips


@pytest.fixture(params=DTYPES, ids=str)
def x(request):
    """Tokens of magnitudes far apart, one of zeros, and blocks that are small or zero beside others."""
    generator = torch.Generator().manual_seed(0)
    x, magnitude = (torch.randn(2, 37, 96, generator=generator) for _ in range(2))
    x *= torch.exp(3 * magnitude)
    x[0, 3], x[1, 4, :32] = 0, 0
    x[1, 5, :48] *= 1e-5
    x[1, 6, :32] *= 1e-9
    return x.to(request.param)


def rounded(x, engine, *spec, base=None):
    static = {} if base is None else {"scale": "static:1"}
    return fake_quantize(x, ActivationSpec.parse(*spec, engine=engine, **static), -1, base)


@pytest.mark.parametrize("base", [None, *BASES])
def test_comfy_kitchen_nvfp4(x, base):
    pytest.importorskip("comfy_kitchen", reason=APART)
    from comfy_kitchen.float_utils import fp4_x2_to_f32, from_blocked
    from comfy_kitchen.tensor import TensorCoreNVFP4Layout

    given = None if base is None else torch.tensor(base)
    codes, made = TensorCoreNVFP4Layout.quantize(x.flatten(0, 1), scale=given)
    scale = made.scale * from_blocked(made.block_scale, len(x.flatten(0, 1)), 6).float()
    values = fp4_x2_to_f32(codes).view(len(codes), 6, 16)[: scale.shape[0]] * scale.unsqueeze(-1)
    assert torch.equal(rounded(x, "comfyui", "nvfp4", base=given), values.reshape(x.shape).to(x.dtype))


def test_comfy_kitchen_of_8_bits(x):
    pytest.importorskip("comfy_kitchen", reason=APART)
    from comfy_kitchen.backends.eager import quantization as eager

    tokens, scale = x.flatten(0, 1), torch.tensor(0.037)
    theirs = eager.dequantize_mxfp8(*eager.quantize_mxfp8(tokens), torch.float32)
    assert torch.equal(rounded(x, "comfyui", "mxfp8"), theirs.view(x.shape).to(x.dtype))
    theirs = eager.quantize_per_tensor_fp8(x.clone(), scale).float() * scale
    assert torch.equal(rounded(x, "comfyui", "fp8", "tensor", base=scale), theirs.to(x.dtype))
    codes, scale = eager.quantize_int8_rowwise(tokens)
    assert torch.equal(rounded(x, "comfyui", "int8"), (codes * scale).view(x.shape).to(x.dtype))


@pytest.mark.parametrize("base", [None, *BASES])
def test_torchao_nvfp4(x, base):
    pytest.importorskip("torchao", reason=APART)
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    tokens = x.flatten(0, 1)
    given = None if base is None else torch.tensor(base)
    scale = per_tensor_amax_to_scale(tokens.abs().max()) if given is None else given
    theirs = NVFP4Tensor.to_nvfp4(tokens, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(rounded(x, "torchao", "nvfp4", base=given), theirs.view(x.shape).to(x.dtype))


def test_torchao_mx_fp8_and_int8(x):
    pytest.importorskip("torchao", reason=APART)
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    tokens, rceil = x.flatten(0, 1), {"scaling_mode": ScaleCalculationMode.RCEIL}
    theirs = {
        "mxfp8": MXTensor.to_mx(tokens, torch.float8_e4m3fn, 32, **rceil),
        "mxfp4": MXTensor.to_mx(tokens, torch.float4_e2m1fn_x2, 32, **rceil),
        "fp8": Float8Tensor.from_hp(tokens, hp_value_lb=1e-12),
    }
    values = {name: tensor.dequantize(torch.float32) for name, tensor in theirs.items()}
    integers = Int8Tensor.from_hp(tokens, PerRow())
    values["int8"] = integers.qdata * integers.scale
    for name, expected in values.items():
        assert torch.equal(rounded(x, "torchao", name), expected.view(x.shape).to(x.dtype)), name


@pytest.mark.parametrize("base", BASES)
def test_modelopt_nvfp4(x, base):
    pytest.importorskip("modelopt.torch.quantization.qtensor", reason=APART)
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    given = torch.tensor(base)
    codes, scale, _ = NVFP4QTensor.quantize(x.flatten(0, 1), 16, None, given)
    theirs = codes.dequantize(torch.float32, scale=scale, double_scale=given, block_sizes={-1: 16})
    assert torch.equal(rounded(x, "modelopt", "nvfp4", base=given), theirs.view(x.shape).to(x.dtype))


@pytest.mark.parametrize("base", BASES)
def test_compressed_tensors_nvfp4(x, base):
    pytest.importorskip("compressed_tensors", reason=APART)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    e4m3 = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", symmetric=True, dynamic="local", group_size=16, **e4m3
    )
    given = torch.tensor(base)
    inverse = (1 / given).reshape(1)
    made = compute_dynamic_scales_and_zp(x, args, None, global_scale=inverse)
    expected = theirs(x, *made, args, global_scale=inverse)
    assert torch.equal(rounded(x, "compressed-tensors", "nvfp4", base=given), expected.to(x.dtype))


@pytest.mark.parametrize(("name", "kind"), [("fp8", "float"), ("int8", "int")])
def test_compressed_tensors_of_8_bits(x, name, kind):
    pytest.importorskip("compressed_tensors", reason=APART)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, type=kind, strategy="token", symmetric=True, dynamic=True)
    expected = theirs(x, *compute_dynamic_scales_and_zp(x, args, None), args)
    assert torch.equal(rounded(x, "compressed-tensors", name), expected)


@pytest.mark.parametrize("shape", [(2, 64), (1, 3, 64)])
def test_diffusers_bfl_fp8(shape):
    """Its layer rounds inputs on CUDA alone, by the formula that it has for weights: a row, or token, by itself."""
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    x = torch.randn(shape)
    codes, scale = utils.quantize_fp8r(x.flatten(0, -2))
    assert torch.equal(rounded(x, "bfl", "fp8"), utils.dequantize_fp8r(codes, scale).view(shape))
