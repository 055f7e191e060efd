#!/usr/bin/env bash
# safetensors 0.8.0 (metadata of two entries) and diffusers 0.42.1 (save_lora_weights with the adapter's metadata)
#
# Expected: saving the same tensors with the same metadata gives the same bytes, as it does without metadata or with one entry.
# Happens: with two entries or more, the order of the entries in the header is drawn anew at each save, also within one process:
# 40 saves of one content give several files of equal length and unequal SHA-256. diffusers writes two entries for every LoRA that is
# saved with its adapter metadata, so the same LoRA has another hash each time.
# Where: the writer keeps metadata in a hash map with a random seed.
# Means: whoever compares, caches or signs weights by the hash of the file sees a change where there is none. Put everything into one
# entry (a JSON string), or hash tensors instead of files.
#
# Guess before running: entries are sorted by name, as tensors are by dtype and name, so that all saves are equal.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import hashlib
from pathlib import Path

import diffusers, safetensors, torch
from diffusers import FluxPipeline
from safetensors.torch import save

print("safetensors", safetensors.__version__, "diffusers", diffusers.__version__)
SAVES = 40
tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.float16)}
for count in range(4):
    metadata = {f"key {number}": "value" for number in range(count)}
    files = [save(tensors, metadata) for _ in range(SAVES)]
    different = len({hashlib.sha256(file).hexdigest() for file in files})
    print(f"{count} entries of metadata: {different} different files of {len({len(file) for file in files})} length in {SAVES} saves")
    assert (different == 1) == (count < 2) and len({len(file) for file in files}) == 1

layers = {"x.lora_A.weight": torch.zeros(4, 8), "x.lora_B.weight": torch.zeros(8, 4)}
digests = set()
for number in range(SAVES):
    FluxPipeline.save_lora_weights(str(number), transformer_lora_layers=layers, transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 4})
    digests.add(hashlib.sha256(Path(str(number), "pytorch_lora_weights.safetensors").read_bytes()).hexdigest())
print(f"save_lora_weights with adapter metadata: {len(digests)} different files in {SAVES} saves")
assert len(digests) == 2
EOF
