#!/usr/bin/env bash
# torch 2.13.0 (oneDNN 3.12.0): onednn.qlinear_pointwise takes int8 inputs by a plain loop, thousands of times as long as uint8 ones
#
# Expected: int8 and uint8 inputs of one product take about the same time, as with torch._int_mm.
# Happens: on a CPU with AVX512_VNNI and without AMX, int8 inputs with float32 or bfloat16 outputs go to oneDNN's reference
# implementation (ONEDNN_VERBOSE says ref_matmul_int8), thousands of times slower; the same numbers as uint8 with a zero point go
# to its fast one, and so does torch._int_mm with int8 inputs. The results are equal. No error, no warning.
# On a CPU with AVX2 alone both are fast, and with AMX there is an implementation for it.
# Means: code that was tuned on another machine seems to hang on this one: a time-out belongs around every first call, and a
# measurement before a choice.
#
# Guess before running: int8 takes twice the time of uint8.
set -euo pipefail
grep -qw avx512_vnni /proc/cpuinfo && ! grep -qw amx_int8 /proc/cpuinfo || { echo "needs a CPU with AVX512_VNNI and without AMX"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir"
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import time
import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.set_num_threads(1)
tokens, outputs, inputs = 8, 1152, 1152
draw = torch.Generator().manual_seed(0)
x = torch.randint(-60, 61, (tokens, inputs), generator=draw).to(torch.int8)
weight = torch.randint(-12, 13, (outputs, inputs), generator=draw).to(torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight.t(), [tokens, inputs])
scale, zero = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)

def linear(x, zero_point):
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero_point, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )

def seconds(run):
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - start)
    return min(taken[1:]), result.float()

unsigned = (x.int() + 60).to(torch.uint8)
runs = {"int8": lambda: linear(x, 0), "uint8": lambda: linear(unsigned, 60), "torch._int_mm, int8": lambda: torch._int_mm(x, weight.t())}
taken = {name: seconds(run) for name, run in runs.items()}
for name, (time_, result) in taken.items():
    print(f"{name:20} {1e3 * time_:10.3f} ms, equal to float64: {torch.equal(result.double(), x.double() @ weight.double().T)}")
assert taken["int8"][0] > 100 * taken["uint8"][0]
EOF
