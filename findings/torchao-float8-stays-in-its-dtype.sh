#!/usr/bin/env bash
# torchao 0.18.0: a model with Float8WeightOnlyConfig moved to another dtype (torch 2.13.0)
#
# Expected: model.to(torch.float16), and from_pretrained(torch_dtype=torch.float16) of a saved one, give a model that computes in float16,
# as they do under NVFP4WeightOnlyConfig and Int8WeightOnlyConfig.
# Happens: the weights of Float8Tensor stay bfloat16 and the biases become float16; the first call dies with "expected m1 and m2 to
# have the same dtype". No error when it is moved or loaded.
# Where: Float8Tensor lists `dtype` among its optional attributes, and TorchAOBaseTensor's aten._to_copy changes the dtype of required
# ones alone.
# Means: a diffusers folder saved with FP8 weights runs in the one dtype that it was quantized in; pipelines that are loaded in float16,
# as on older GPUs, die at their first step.
#
# Guess before running: all three compute in float16.
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
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

print("torch", torch.__version__, "torchao", version("torchao"))
x = torch.randn(2, 64, dtype=torch.float16)
for config in (NVFP4WeightOnlyConfig(), Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    quantize_(model, config)
    model.to(torch.float16)
    try:
        told = str(model(x).dtype)
    except RuntimeError as error:
        told = str(error)
    print(f"{type(config).__name__}: {told}")
    assert ("to have the same dtype" in told) == isinstance(config, Float8WeightOnlyConfig)
EOF
