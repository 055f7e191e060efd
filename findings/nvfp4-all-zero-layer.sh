#!/usr/bin/env bash
# NVFP4 of a layer whose weights are all zero (torchao 0.18.0, comfy-kitchen 0.2.40, diffusers 0.42.1, torch 2.13.0)
#
# Expected: zero is a value of E2M1, so a zero weight decodes to zero.
# Happens: the tensor's second-level scale is amax / (448 * 6) = 0, each block's scale is 0 / 0, and the whole layer decodes to
# NaN. torchao guards single blocks (a floor under the E4M3 scale) but a floor does not stop a NaN; comfy-kitchen masks blocks
# whose scale is zero, and NaN is not zero. One-level NVFP4 and MXFP4 of the same weight are fine.
# Where: torchao's per_tensor_amax_to_scale and nvfp4_quantize; comfy_kitchen.quantize_nvfp4 with the usual scale amax / 2688.
# Means: diffusion models have such layers by design. A new Flux ControlNet starts with zero projections (three of them in the
# model below), and NVFP4WeightOnlyConfig with its default settings turns its output from exact zeros into NaN. Leave
# zero-initialized layers out, or give zero tensors a scale of 1, as compressed-tensors does.
#
# Guess before running: comfy-kitchen gives NaN, torchao (which has the floor) gives zeros.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchao==0.18.0 comfy-kitchen==0.2.40 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import comfy_kitchen, diffusers, torch, torchao
from importlib.metadata import version
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import quantize_

print("torch", torch.__version__, "torchao", torchao.__version__, "comfy-kitchen", version("comfy-kitchen"), "diffusers", diffusers.__version__)
zero = torch.zeros(32, 64)
layer = torch.nn.Linear(64, 32, bias=False)
torch.nn.init.zeros_(layer.weight)
quantize_(layer, NVFP4WeightOnlyConfig())
base = torch.tensor(0.0) / 2688
codes, scales = comfy_kitchen.quantize_nvfp4(zero, base)
decoded = {
    "torchao NVFP4, default (two levels)": layer.weight.dequantize(),
    "torchao NVFP4, one level": NVFP4Tensor.to_nvfp4(zero).dequantize(),
    "torchao MXFP4": MXTensor.to_mx(zero, torch.float4_e2m1fn_x2, block_size=32).dequantize(),
    "comfy-kitchen NVFP4": comfy_kitchen.dequantize_nvfp4(codes, base, scales),
}
for name, weight in decoded.items():
    print(f"{name}: {int(weight.isnan().sum())} of {weight.numel()} weights are NaN")
nan = {name: bool(weight.isnan().all()) for name, weight in decoded.items()}
assert list(nan.values()) == [True, False, False, True], nan

torch.manual_seed(0)
size = dict(num_attention_heads=2, attention_head_dim=16)
transformer = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **size)
control = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **size).eval()
zeros = [name for name, module in control.named_modules() if isinstance(module, torch.nn.Linear) and not module.weight.any()]
print("zero-initialized layers of a new FluxControlNetModel:", *zeros)
inputs = dict(hidden_states=torch.randn(1, 4, 16), controlnet_cond=torch.randn(1, 4, 16), encoder_hidden_states=torch.randn(1, 3, 32),
              pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]), img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3), return_dict=False)
with torch.no_grad():
    before = control(**inputs)[0][0]
    quantize_(control, NVFP4WeightOnlyConfig())
    after = control(**inputs)[0][0]
print("largest output before:", before.abs().max().item(), "after NVFP4WeightOnlyConfig():", after.abs().max().item())
assert len(zeros) == 3 and not before.any() and after.isnan().all()
EOF
