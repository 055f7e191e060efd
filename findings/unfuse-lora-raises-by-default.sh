#!/usr/bin/env bash
# diffusers 0.42.1: unfuse_lora() without arguments raises for pipelines whose LoRAs are in the transformer alone (torch 2.13.0, peft 0.21.2)
#
# Expected: after fuse_lora(), whose default is what the pipeline can fuse, unfuse_lora() undoes it.
# Happens: ValueError, "text_encoder is not found": its default names a text encoder that these pipelines do not count among the parts that take a LoRA.
# Where: loaders/lora_pipeline.py: unfuse_lora(components=["transformer", "text_encoder"]) in mixins whose _lora_loadable_modules is ["transformer"].
# Means: the calls that the documentation of fusing shows fail at the second step; unfuse_lora(components=["transformer"]) works.
#
# Guess before running: the default of unfuse_lora goes with that of fuse_lora in every pipeline.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'PY' || { cat "$dir/python.log" >&2; exit 1; }
import inspect

import diffusers, peft, torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import lora_pipeline

print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)
kinds = [kind for name, kind in vars(lora_pipeline).items() if name.endswith("LoraLoaderMixin") and "unfuse_lora" in vars(kind)]
default = lambda kind, method: set(inspect.signature(getattr(kind, method)).parameters["components"].default)
apart = [kind.__name__ for kind in kinds if default(kind, "unfuse_lora") - set(kind._lora_loadable_modules)]
print(f"{len(apart)} of {len(kinds)} loaders name parts to unfuse that they cannot fuse")
torch.manual_seed(0)
transformer = AuraFlowTransformer2DModel(
    sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
    caption_projection_dim=16, pos_embed_max_size=16,
)
transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
pipe = AuraFlowPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler())
pipe.fuse_lora()
try:
    pipe.unfuse_lora()
    said = None
except ValueError as error:
    said = str(error)
print("unfuse_lora():", said)
pipe.unfuse_lora(components=["transformer"])
assert said and "text_encoder is not found" in said and "AuraFlowLoraLoaderMixin" in apart
PY
