#!/usr/bin/env bash
# safetensors 0.8.0 and its narrow dtypes F4 and F8_E8M0 (torch 2.13.0, transformers 5.23.0, ml_dtypes 0.6.0)
#
# Expected: what save writes, every reader of the same package reads.
# Happens: save_file / load_file round-trip torch.float4_e2m1fn_x2 and torch.float8_e8m0fnu, but
#  - safetensors.torch.load(bytes) raises KeyError for both, while safetensors.torch.save wrote them;
#  - safe_open(...).get_slice of an F4 tensor raises on every index, the full slice included: the header counts elements
#    ([4, 12]), the reader reshapes torch's bytes ([4, 6]) to it;
#  - safetensors.numpy.save writes BF16 and the float8 kinds of ml_dtypes, and safetensors.numpy.load raises KeyError for them.
# Where: the dtype table of safetensors.torch.load, the slice class of the Rust binding, the dtype table of safetensors.numpy.load.
# Means: transformers loads by get_slice, so a text encoder holding an F4 parameter can be saved and not loaded. Store 4-bit codes
# as U8 with two codes a byte, and E8M0 scales as U8, as ModelOpt, ComfyUI, torchao and compressed-tensors do.
#
# Guess before running: get_slice of F4 cuts at the wrong column without an error; numpy refuses to save the narrow dtypes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==5.23.0 ml_dtypes==0.6.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import ml_dtypes, numpy, safetensors, torch, transformers
import safetensors.numpy
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from transformers import CLIPTextConfig, CLIPTextModel


def error(call):
    try:
        call()
    except Exception as caught:
        return f"{type(caught).__name__}: {str(caught)[:90]}"
    return "no error"


print("safetensors", safetensors.__version__, "torch", torch.__version__, "transformers", transformers.__version__, "ml_dtypes", ml_dtypes.__version__)
codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
narrow = {"F4": codes.view(torch.float4_e2m1fn_x2), "F8_E8M0": codes.clone().view(torch.float8_e8m0fnu)}
save_file(narrow, "narrow.safetensors")
for name, tensor in load_file("narrow.safetensors").items():
    assert tensor.dtype == narrow[name].dtype and torch.equal(tensor.view(torch.uint8), codes)
print("load_file: both come back")
for name, tensor in narrow.items():
    seen = error(lambda: load(save({name: tensor})))
    print(f"safetensors.torch.load(save(...)) of {name}: {seen}")
    assert seen.startswith("KeyError")
with safe_open("narrow.safetensors", "pt") as file:
    for index in (slice(None), slice(0, 2), (slice(None), slice(0, 6)), 0):
        seen = error(lambda: file.get_slice("F4")[index])
        print(f"get_slice('F4')[{index}]: {seen}")
        assert seen.startswith("RuntimeError")
        assert error(lambda: file.get_slice("F8_E8M0")[index]) == "no error"
for kind in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    data = safetensors.numpy.save({"x": numpy.zeros((2, 4), getattr(ml_dtypes, kind))})
    seen = error(lambda: safetensors.numpy.load(data))
    print(f"safetensors.numpy.load(save(...)) of {kind}: {seen}")
    assert seen.startswith("KeyError")


class Encoder(CLIPTextModel):
    def __init__(self, config):
        super().__init__(config)
        self.quantized = torch.nn.Module()
        self.quantized.codes = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.uint8).view(dtype), requires_grad=False)


config = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
for dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
    Encoder(config).save_pretrained("encoder")
    seen = error(lambda: Encoder.from_pretrained("encoder"))
    print(f"transformers from_pretrained of a model with a {dtype} parameter: {seen}")
    assert (seen == "no error") == (dtype is torch.float8_e8m0fnu)
EOF
