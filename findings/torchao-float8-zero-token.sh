#!/usr/bin/env bash
# torchao 0.18.0: a token of zeros under dynamic FP8, a scale a row (torch 2.13.0)
#
# Expected: a linear layer gives its bias for an input row of zeros, as it does under dynamic INT8.
# Happens: that row is NaN. The row's scale is 0, and 0 / 0 is NaN, which float8 keeps. With one scale a tensor it takes an input that
# is zero as a whole.
# Where: _choose_scale_float8 divides the largest magnitude by 448 and has no floor but `hp_value_lb`, which
# Float8DynamicActivationFloat8WeightConfig leaves at None (activation_value_lb); Int8Tensor has an epsilon there.
# Means: padding that is masked out, and embeddings of zeros in place of a prompt or of a text encoder that was left out (Stable
# Diffusion 3 without T5), make black images. Float8DynamicActivationFloat8WeightConfig(activation_value_lb=1e-12) is the way around.
# The configuration itself asks for a GPU, so the tensors are made here as it makes them, by torch's kernels.
#
# Guess before running: the bias.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchao==0.18.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'EOF' || { cat "$dir/python.log" >&2; exit 1; }
import torch
from importlib.metadata import version
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, Int8DynamicActivationInt8WeightConfig, PerRow, quantize_
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

print("torch", torch.__version__, "torchao", version("torchao"))
torch.manual_seed(0)
x = torch.randn(3, 32)
x[1] = 0
for lowest in (None, 1e-12):
    layer, sums = torch.nn.Linear(32, 32), Float8MMConfig(use_fast_accum=True)
    inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), mm_config=sums, hp_value_lb=lowest)
    weight = Float8Tensor.from_hp(layer.weight.detach(), granularity=PerRow(), mm_config=sums, act_quant_kwargs=inputs)
    rows = torch.nn.functional.linear(x, weight, layer.bias).isnan().any(1).tolist()
    print(f"FP8, activation_value_lb={lowest}: rows with NaN {rows}")
    assert rows == [False, lowest is None, False]
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
quantize_(model, Int8DynamicActivationInt8WeightConfig())
rows = model(x).isnan().any(1).tolist()
print(f"INT8: rows with NaN {rows}")
assert not any(rows)
EOF
