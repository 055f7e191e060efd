#!/usr/bin/env bash
# optimum-quanto 0.2.7: one output channel of zeros under qfloat8 (torch 2.13.0)
#
# Expected: the channel decodes to zeros, as it does under qint8.
# Happens: under qfloat8 (e4m3fn, e5m2 and e4m3fnuz alike) the channel decodes to NaN, so one output of the layer is NaN for every
# input. The channel's scale is 0; 0 / 0 is NaN; qint8 hides it because casting NaN to an integer gives 0, a float8 keeps it.
# Where: the absmax optimizer returns a scale of 0, and the symmetric quantization divides by it without a guard.
# Means: pruned and zero-initialized channels (ControlNet and adaLN-Zero projections, freshly added heads) turn a float8 model's
# images black, while the int8 model of the same weights is right. Zero rows need a scale of 1 or a floor.
#
# Guess before running: NaN in the zero row under both qfloat8 and qint8.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 optimum-quanto==0.2.7 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
from importlib.metadata import version
from optimum.quanto import freeze, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint8, quantize

print("torch", torch.__version__, "optimum-quanto", version("optimum-quanto"))
torch.manual_seed(0)
x = torch.randn(3, 32)
for qtype in (qint8, qfloat8_e4m3fn, qfloat8_e5m2, qfloat8_e4m3fnuz):
    model = torch.nn.Sequential(torch.nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight[5] = 0
    quantize(model, weights=qtype)
    freeze(model)
    with torch.no_grad():
        y = model(x)
    columns = y.isnan().all(0).nonzero().flatten().tolist()
    print(f"{qtype.name}: output channels that are NaN for every input: {columns}")
    assert columns == ([] if qtype is qint8 else [5])
    assert int(y.isnan().sum()) == 3 * len(columns)
EOF
