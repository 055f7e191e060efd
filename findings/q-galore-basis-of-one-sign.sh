#!/usr/bin/env bash
# q-galore-torch 1.0: the 4-bit basis of a gradient whose leading direction has one sign (torch 2.13.0)
#
# Expected: projected to a basis in 4 bits (groups of 256) and back, a gradient of rank 1 is what it was to a few per cent.
# Happens: of a direction from 0.5 to 1.5 (before it is normalized) 0.72 of the length is left, and of one whose entries are alike
# nothing: 3e-8. One that has both signs keeps 0.998.
# Where: GaLoreProjector._quantize spaces the levels from the least to the largest value of a group, and clamps the zero point to 0..15. With
# a least value above zero the zero point would be negative; clamped, the top level stands for largest minus least.
# Means: the leading singular vector of gradients has one sign where inputs do, after a ReLU or GELU or a softmax; there steps shrink or
# vanish, without a word. Letting the range hold zero, or the zero point be negative, mends it.
#
# Guess before running: at least 0.95 of each.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile "$@" 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }; }
pip torch==2.13.0 numpy==2.4.6
pip --no-deps q-galore-torch==1.0
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'PY' || { cat "$dir/python.log" >&2; exit 1; }
import importlib.metadata
import importlib.util

import torch

installed = importlib.metadata.distribution("q-galore-torch")
# the file by itself: the package's __init__ imports bitsandbytes, which the projector does not use
spec = importlib.util.spec_from_file_location("projector", installed.locate_file("q_galore_torch/q_galore_projector.py"))
projector = importlib.util.module_from_spec(spec)
spec.loader.exec_module(projector)
print("torch", torch.__version__, "q-galore-torch", installed.version)
rows = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
kept = {}
for name, direction in {
    "entries alike": torch.ones(256),
    "0.5 to 1.5": torch.linspace(0.5, 1.5, 256),
    "-1 to 1": torch.linspace(-1, 1, 256),
}.items():
    gradient = rows @ direction[None]
    basis = projector.GaLoreProjector(1, quant=True, group_size=256, n_bit=4)
    back = basis.project_back(basis.project(gradient, 0))
    kept[name] = (back.norm() / gradient.norm()).item()
    print(f"{name}: {kept[name]:.3g} of the gradient's length is left")
assert kept["entries alike"] < 1e-6
assert 0.6 < kept["0.5 to 1.5"] < 0.8
assert kept["-1 to 1"] > 0.99
PY
echo "as stated above"
