#!/usr/bin/env bash
# torch 2.13.0: the scale dtype float8_e8m0fnu (ml_dtypes 0.6.0 for comparison)
#
# Expected: an unsigned power of two; a value that it cannot hold (zero, a negative number) is NaN or an error; the cast
# follows the floor rule of the OCP MX text, or at least the nearest exponent.
# Happens: .to(torch.float8_e8m0fnu) drops the sign (-3 becomes 4), turns 0 into 2^-127, and rounds to the nearest VALUE with ties
# upwards (1.5 -> 2, 3 -> 4), so it is neither the floor rule (3 -> 2) nor the ceiling (1.25 -> 1), and the last step overflows to NaN.
# ml_dtypes rounds the same way but makes NaN of zero and of negative numbers. torch.zeros makes 2^-127, yet padding with
# zeros (F.pad) raises; torch.equal and abs raise too. finfo.min is the smallest positive number, for every other dtype it is -max.
# Where: the c10 type Float8_e8m0fnu and its casts; torch.finfo.
# Means: casting amax / 6 to E8M0 is not an MX scale: a block whose scale falls into [1, 1.5) * 2^k gets the scale rounded down and its
# largest weights are cut, by up to a third (by the floor rule, up to a quarter): half of Gaussian blocks below. Keep the exponent as uint8.
#
# Guess before running: zero becomes 2^-127 and 3 becomes 4; padding works; a negative number becomes NaN as in ml_dtypes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import ml_dtypes, numpy, torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
kind = torch.float8_e8m0fnu
values = numpy.array([0, -3, 1, 1.25, 1.5, 3, 6, 2.0**127, 1.5 * 2.0**127], numpy.float32)
ours = torch.tensor(values).to(kind).float().numpy()
theirs = values.astype(ml_dtypes.float8_e8m0fnu).astype(numpy.float32)
print("input    ", values)
print("torch    ", ours)
print("ml_dtypes", theirs)
nan, tiny = numpy.nan, numpy.float32(2.0**-127)
numpy.testing.assert_array_equal(ours, numpy.array([tiny, 4, 1, 1, 2, 4, 8, 2.0**127, nan], numpy.float32))
numpy.testing.assert_array_equal(theirs, numpy.array([nan, nan, 1, 1, 2, 4, 8, 2.0**127, nan], numpy.float32))

info = torch.finfo(kind)
print("torch.finfo: min", info.min, "max", info.max, "; torch.zeros holds", torch.zeros(1, dtype=kind).float().item())
assert info.min == 2.0**-127 and torch.zeros(1, dtype=kind).float().item() == 2.0**-127
one = torch.ones(2, dtype=kind)
for name, call in (("F.pad with zeros", lambda: torch.nn.functional.pad(one, (0, 1))), ("torch.equal", lambda: torch.equal(one, one)), ("abs", one.abs)):
    try:
        call()
        raise SystemExit(f"{name} works now")
    except (RuntimeError, NotImplementedError) as error:
        print(f"{name}: {type(error).__name__}: {error}")

amax = torch.randn(100_000, 32, generator=torch.Generator().manual_seed(0)).abs().amax(1)
cut = (amax / (amax / 6).to(kind).float() > 6).double().mean().item()
print(f"Gaussian blocks of 32 whose largest value exceeds 6 after an E8M0 cast of amax / 6: {cut:.1%}")
assert 0.45 < cut < 0.6
EOF
