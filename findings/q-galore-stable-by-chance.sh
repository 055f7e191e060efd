#!/usr/bin/env bash
# q-galore-torch 1.0: whether a subspace counts as stable depends on the signs of an SVD (torch 2.13.0)
#
# Expected: gradients that stay in the same directions make the interval between two SVDs double after five comparisons.
# Happens: with the very same gradient it does. With gradients of the same right singular vectors and singular values, and other left ones,
# the "cosine" of the leading vectors is 1 or -1 by chance, and the interval doubles later or not within the run.
# Where: GaLoreProjector.project compares the first singular vector with the one before by its signed cosine; an SVD is free to choose the
# sign of each pair of vectors. The magnitude, or the overlap of the subspaces, does not depend on it.
# Means: the lazy update, which the paper counts among its savings, depends on chance wherever mini-batches change.
#
# Guess before running: all comparisons are 1, since the directions are the same.
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


def compared(changes, count=40):
    """The comparisons of `count` refreshes of one basis, until the interval grows; and whether it grew."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q.T
    rows = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q
    basis, seen = projector.GaLoreProjector(4, update_proj_gap=1), []
    for step in range(count):
        if changes:
            rows = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q
        basis.project((rows * torch.tensor([8.0, 4.0, 2.0, 1.0])) @ directions, step)
        seen += [round(one) for one in basis.queue[-1:]]
        if basis.update_proj_gap > 1:
            break
    return seen


same, others = compared(changes=False), compared(changes=True)
print("the same gradient:", same)
print("other rows, same directions:", others)
assert same == [1] * 5
assert set(others) == {1, -1} and len(others) > 5
PY
echo "as stated above"
