#!/usr/bin/env bash
# transformers 5.23.0, diffusers 0.42.1: a folder quantized by a method that is not installed (torch 2.13.0)
#
# Expected: from_pretrained raises an error that names the quant_method, as diffusers does.
# Happens: transformers logs a warning, loads the model as if it were in full precision and returns it: the quantized weights, whose names or shapes
# it does not know, are left out, and layers have random weights. diffusers raises ValueError for the same config.
# Where: transformers/quantizers/auto.py, AutoHfQuantizer.supports_quant_method, which returns False after the warning; from_pretrained goes on.
# Means: a text encoder that was quantized by a package that its user did not import makes images of something else, without an error; the one
# sign is a warning, and the report of missing weights below it.
#
# Guess before running: both raise an error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'EOF' || { cat "$dir/python.log" >&2; exit 1; }
import json
import diffusers, torch, transformers
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

print("transformers", transformers.__version__, "diffusers", diffusers.__version__)


def made_by_another(folder, file):
    """Give the layers of a saved model codes in place of weights, and its config a quant_method."""
    tensors = {(f"{name[:-6]}qweight" if name.endswith("q.weight") else name): one for name, one in load_file(f"{folder}/{file}").items()}
    save_file(tensors, f"{folder}/{file}", {"format": "pt"})
    config = json.load(open(f"{folder}/config.json"))
    config["quantization_config"] = {"quant_method": "another"}
    json.dump(config, open(f"{folder}/config.json", "w"))


encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))
encoder.save_pretrained("encoder")
made_by_another("encoder", "model.safetensors")
first, second = (T5EncoderModel.from_pretrained("encoder") for _ in range(2))
layer = "encoder.block.0.layer.0.SelfAttention.q.weight"
one, other, saved = (model.state_dict()[layer] for model in (first, second, encoder))
print("transformers: returned a", type(first).__name__, "; the layer is as saved:", torch.equal(one, saved), "; the same twice:", torch.equal(one, other))
assert not torch.equal(one, saved) and not torch.equal(one, other)

DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=1, sample_size=8).save_pretrained("backbone")
made_by_another("backbone", "diffusion_pytorch_model.safetensors")
try:
    DiTTransformer2DModel.from_pretrained("backbone")
    told = "loaded"
except ValueError as error:
    told = str(error).split(" - ")[0][:60]
print("diffusers:", told)
assert "Unknown quantization type" in told
EOF
