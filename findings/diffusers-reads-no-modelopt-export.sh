#!/usr/bin/env bash
# diffusers 0.42.1 on a folder that nvidia-modelopt 0.47.0 exported (torch 2.13.0)
#
# Expected: from_pretrained on the folder that ModelOpt's export_hf_checkpoint wrote of a diffusers model, whose config.json says
# quant_method modelopt, loads it, or says that it cannot.
# Happens: TypeError: NVIDIAModelOptConfig.__init__() missing 1 required positional argument: 'quant_type', for NVFP4 and FP8 alike.
# Where: ModelOpt writes `quant_algo` and `config_groups`; diffusers' configuration of the same quant_method wants the `quant_type` of its
# own way, in which a model is quantized while it loads, and passes all that it reads to the constructor.
# Means: the two share the name `modelopt` and no format. Published `*-NVFP4` folders of diffusers models are for vLLM-Omni, SGLang and
# TensorRT; plain diffusers needs another one of the same weights.
#
# Guess before running: it loads and decodes the weights.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 accelerate==1.15.0 \
    transformers==5.23.0 nvidia-modelopt==0.47.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'EOF' || { cat "$dir/python.log" >&2; exit 1; }
import json
from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from diffusers import DiTTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint

print("diffusers", version("diffusers"), "nvidia-modelopt", version("nvidia-modelopt"))
for name in ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"):
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=1, sample_size=8)
    call = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    mtq.quantize(model, getattr(mtq, name), forward_loop=lambda one: one(torch.randn(1, 4, 8, 8), **call))
    export_hf_checkpoint(model, export_dir=name)
    print(name, json.load(open(f"{name}/config.json"))["quantization_config"]["quant_algo"])
    try:
        DiTTransformer2DModel.from_pretrained(name)
        told = "loaded"
    except TypeError as error:
        told = str(error)
    print(" ", told)
    assert "quant_type" in told
EOF
