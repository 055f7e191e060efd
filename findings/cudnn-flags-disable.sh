#!/usr/bin/env bash
# torch 2.13.0: torch.backends.cudnn.flags(allow_tf32=False) also switches cuDNN off
#
# Expected: a context manager that sets what it is told and keeps the rest.
# Happens: its `enabled` parameter defaults to False, so inside the block cuDNN is off altogether, and benchmark and deterministic
# go back to False whatever the caller had chosen. torch.backends.mkldnn.flags has the same default (oneDNN, on the CPU).
# Where: the function flags in torch/backends/cudnn (and in torch/backends/mkldnn).
# Means: a library that calibrates or evaluates "without TF32" this way runs every convolution of a UNet or VAE through the native
# kernels: slower, more memory, other numbers. Pass enabled=True, or set torch.backends.cudnn.allow_tf32 and put it back.
#
# Guess before running: enabled becomes False, benchmark is kept.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import torch

cudnn = torch.backends.cudnn
print("torch", torch.__version__)
names = ("enabled", "benchmark", "deterministic", "allow_tf32")
cudnn.benchmark = cudnn.deterministic = True
state = lambda: {name: getattr(cudnn, name) for name in names}
before = state()
with cudnn.flags(allow_tf32=False):
    inside = state()
after = state()
print("before", before)
print("inside", inside)
print("after ", after)
assert before == after == dict(enabled=True, benchmark=True, deterministic=True, allow_tf32=True)
assert inside == dict(enabled=False, benchmark=False, deterministic=False, allow_tf32=False)
with torch.backends.mkldnn.flags(allow_tf32=False):
    print("torch.backends.mkldnn.flags(allow_tf32=False): enabled", torch.backends.mkldnn.enabled)
    assert not torch.backends.mkldnn.enabled
EOF
