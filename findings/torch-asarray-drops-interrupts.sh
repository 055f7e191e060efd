#!/usr/bin/env bash
# torch 2.13.0: torch.asarray of an untyped storage, and safetensors 0.8.0, whose load_file calls it
#
# Expected: an exception that a signal handler raises while torch.asarray runs (Ctrl-C: KeyboardInterrupt) comes out of the call.
# Happens: asarray calls the storage's __getitem__, which is Python; an exception raised there is dropped, and the call raises
# "ValueError: could not determine the shape of object type 'torch.storage.UntypedStorage'", with neither cause nor context.
# Where: the part of asarray that finds the shape of a sequence takes any failure to read an element for a missing shape. safetensors
# calls asarray on a slice of the file's storage for every tensor, so that a third to a half of the interrupts of load_file are lost.
# Means: a program that loads a model and is told to stop may see a ValueError that speaks of storages: "except KeyboardInterrupt" does
# not clean up, a handler that turns SIGTERM into SystemExit does not end the process with its code, and what takes ValueError for a
# broken file goes on with another one. A handler that notes the signal before it raises lets the caller tell the two apart.
#
# Guess before running: asarray drops an exception raised while it looks at the storage.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import random, signal, time
from collections import Counter

import safetensors, torch
from safetensors.torch import load_file, save_file

print("torch", torch.__version__, "safetensors", safetensors.__version__)
INTERRUPTS = 200
LOST = "ValueError: could not determine the shape of object type 'torch.storage.UntypedStorage', no context"
signal.signal(signal.SIGALRM, signal.default_int_handler)  # an alarm does what Ctrl-C does
draw = random.Random(0)


def interrupted(call, seconds):
    """What ends `call`, repeated, when an alarm comes within `seconds`; counted over INTERRUPTS runs."""
    ends = Counter()
    for _ in range(INTERRUPTS):
        try:
            end = time.perf_counter() + 60
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(seconds / 10, seconds))
            while time.perf_counter() < end:
                call()
            ends["no error"] += 1
        except (KeyboardInterrupt, ValueError) as error:
            context = "no context" if error.__context__ is None and error.__cause__ is None else "chained"
            ends["KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else f"ValueError: {error}, {context}"] += 1
    return ends


save_file({f"layer {number}": torch.zeros(64) for number in range(500)}, "model.safetensors")
begin = time.perf_counter()
load_file("model.safetensors")
loading = time.perf_counter() - begin
storage, rows = torch.zeros(64).untyped_storage(), [[0.0] * 8] * 8
for name, loses, call, seconds in (
    ("torch.asarray(storage)", True, lambda: torch.asarray(storage, dtype=torch.uint8), 0.002),
    ("safetensors' load_file", True, lambda: load_file("model.safetensors"), loading),
    ("storage[0:8]", False, lambda: storage[0:8], 0.002),
    ("torch.asarray(lists of numbers)", False, lambda: torch.asarray(rows), 0.002),
):
    ends = interrupted(call, seconds)
    print(f"{name}: {dict(ends)}")
    assert set(ends) <= {"KeyboardInterrupt", LOST} and (ends[LOST] > 0) == loses, (name, ends)
EOF
