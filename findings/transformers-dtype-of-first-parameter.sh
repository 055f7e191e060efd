#!/usr/bin/env bash
# transformers 5.23.0: a text encoder whose first parameter is float8 saves and does not load (torch 2.13.0)
#
# Expected: config.json tells the dtype of the bulk of the model, and a saved folder loads.
# Happens: save_pretrained writes the dtype of the FIRST floating parameter. Where the token embedding is kept in float8_e4m3fn (weight
# storage only), config.json says "dtype": "float8_e4m3fn", and from_pretrained dies with "couldn't find storage object
# Float8_e4m3fnStorage", because it makes that the default dtype. With dtype=torch.float32 it loads, and the embedding is float32.
# Where: PreTrainedModel.dtype, used by save_pretrained; torch's default dtype set in from_pretrained.
# Means: casting the embeddings of T5 or CLIP to float8 to save memory makes a folder that the pipeline cannot open. Give the dtype
# when loading the text encoder, or hold narrow weights as uint8.
#
# Guess before running: saving works, loading raises TypeError.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.23.0 safetensors==0.8.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import json, torch, transformers
from transformers import CLIPTextConfig, CLIPTextModel

print("transformers", transformers.__version__, "torch", torch.__version__)
model = CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                     max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0))
embedding = model.get_input_embeddings().weight
embedding.data = embedding.data.to(torch.float8_e4m3fn)
dtypes = [parameter.dtype for parameter in model.parameters()]
model.save_pretrained("encoder")
written = json.load(open("encoder/config.json"))["dtype"]
print(f"{dtypes.count(torch.float32)} of {len(dtypes)} parameters are float32; config.json says {written}")
assert written == "float8_e4m3fn" and dtypes.count(torch.float32) == len(dtypes) - 1
try:
    CLIPTextModel.from_pretrained("encoder")
    raise SystemExit("the folder loads now")
except TypeError as error:
    print("from_pretrained: TypeError:", error)
    assert "Float8_e4m3fnStorage" in str(error)
loaded = CLIPTextModel.from_pretrained("encoder", dtype=torch.float32)
print("from_pretrained(dtype=torch.float32): embedding", loaded.get_input_embeddings().weight.dtype)
assert loaded.get_input_embeddings().weight.dtype == torch.float32
EOF
