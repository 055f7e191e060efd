#!/usr/bin/env bash
# INT8 of bfloat16 tensors on the CPU (comfy-kitchen 0.2.40, torch 2.13.0)
#
# Expected: each value becomes the integer nearest to value / scale; a bfloat16 checkpoint gives the codes that the same weights
# in float32 give, since every bfloat16 number is a float32 number.
# Happens: the eager backend divides in the tensor's own dtype. Scale and quotient are rounded to bfloat16 (8 bits: between 64 and
# 127 its numbers lie 0.5 apart) before the quotient is rounded to an integer, so one code in 13 is another.
# Where: comfy_kitchen.backends.eager.quantization, quantize_int8_rowwise and quantize_int8_tensorwise (`_int8_scale_for_math`);
# through it TensorWiseINT8Layout.quantize, for weights of a checkpoint and for the inputs of every layer.
# Means: whoever makes int8_tensorwise files on a CPU from bfloat16 weights gets a tenth more squared error than the format has;
# cast weights to float32 first, which costs nothing in the file.
#
# Guess before running: a few percent of the codes differ, by one, and the error hardly changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 comfy-kitchen==0.2.40 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout

print("torch", torch.__version__, "comfy-kitchen", version("comfy-kitchen"))
torch.manual_seed(0)
weight = (torch.randn(1024, 3072) * 0.03).bfloat16()


def quantized(tensor):
    codes, params = TensorWiseINT8Layout.quantize(tensor, per_channel=True)
    return codes, ((codes.double() * params.scale.double() - weight.double()).norm() / weight.double().norm()).item()


codes, error = quantized(weight)
nearest, least = quantized(weight.float())
share = (codes != nearest).double().mean().item()
print(f"codes that differ: {share:.1%}, at most by {(codes.int() - nearest.int()).abs().max().item()}")
print(f"relative squared error: {error**2:.2e} from bfloat16, {least**2:.2e} from the same weights in float32")
assert 0.05 < share < 0.11 and error**2 > 1.08 * least**2
EOF
