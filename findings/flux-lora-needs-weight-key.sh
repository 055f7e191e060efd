#!/usr/bin/env bash
# diffusers 0.42.1: load_lora_weights on a Flux transformer quantized by optimum-quanto 0.2.7 (peft 0.21.2, torch 2.13.0)
#
# Expected: the LoRA lands on the layers, as on a plain or a torchao model, or an error says that the layer's kind is not supported.
# Happens: KeyError: '<layer>.weight'. The layer is an nn.Linear with a weight; its state_dict has 'weight._data' and
# 'weight._scale' in place of 'weight'. Before freeze(), when the key is still there, the same call works.
# Where: the shape check of FluxLoraLoaderMixin (the helper that may expand the transformer for LoRAs of other widths) looks the key up
# in transformer.state_dict() for every layer that the LoRA names; bitsandbytes layers have a branch of their own.
# Means: every quantizer whose layers store other keys than 'weight' (codes and scales) cannot take a Flux LoRA through the pipeline.
# Add the LoRA with peft on the transformer, or let the layer's state_dict carry that key.
#
# Guess before running: KeyError on a frozen quanto model; torchao, whose state_dict keeps 'weight', works.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchao==0.18.0 optimum-quanto==0.2.7 peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import diffusers, peft, torch, torchao
from importlib.metadata import version
from diffusers import FluxPipeline, FluxTransformer2DModel
from optimum.quanto import freeze, qint8, quantize
from torchao.quantization import Int8WeightOnlyConfig, quantize_

print("diffusers", diffusers.__version__, "peft", peft.__version__, "optimum-quanto", version("optimum-quanto"), "torchao", torchao.__version__, "torch", torch.__version__)


def quanto(model):
    quantize(model, weights=qint8)


def frozen_quanto(model):
    quanto(model)
    freeze(model)


layer = "transformer_blocks.0.attn.to_q"
lora = {f"transformer.{layer}.lora_A.weight": torch.randn(4, 32), f"transformer.{layer}.lora_B.weight": torch.randn(32, 4)}
seen = {}
for name, prepare in {
    "full precision": lambda model: None,
    "torchao int8": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "quanto int8, not frozen": quanto,
    "quanto int8, frozen": frozen_quanto,
}.items():
    model = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
                                   joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8])
    prepare(model)
    keys = [key.removeprefix(layer + ".") for key in model.state_dict() if key.startswith(layer + ".")]
    pipeline = FluxPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=model)
    try:
        pipeline.load_lora_weights(dict(lora))
        seen[name] = "loaded"
    except KeyError as error:
        seen[name] = f"KeyError: {error}"
    print(f"{name}: the layer's keys {keys}: {seen[name]}")
assert list(seen.values()) == ["loaded"] * 3 + [f"KeyError: '{layer}.weight'"], seen
EOF
