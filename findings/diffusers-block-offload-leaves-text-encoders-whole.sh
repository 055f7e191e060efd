#!/usr/bin/env bash
# diffusers 0.42.1: block_level group offloading puts a text encoder of transformers on the GPU whole (transformers 5.23.0, torch 2.13.0)
#
# Expected: with num_blocks_per_group=1 the device holds one block of every part at a time, of T5-XXL a 24th.
# Happens: for T5EncoderModel, CLIPTextModel (2 blocks here) and others there is one group, the whole model, loaded when the encoder is called: 9.5 GB of
# T5-XXL in bfloat16 at once, where the backbone beside it goes block by block. No warning. offload_type="leaf_level" works as described.
# Where: hooks/group_offloading.py, _apply_group_offloading_block_level looks for ModuleList and Sequential among the module's direct children alone;
# those of transformers' encoders are further down (encoder.block, encoder.layers), and only diffusers' own models name theirs (_group_offload_block_modules).
# Means: peak memory of DiffusionPipeline.enable_group_offload(offload_type="block_level") is that of model offloading, wherever the text encoder is the largest part.
#
# Guess before running: the largest group of the encoder holds all of it, the largest of the backbone below a half.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import diffusers, torch, transformers
from diffusers import PixArtTransformer2DModel
from diffusers.hooks import apply_group_offloading
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=256, num_layers=8, num_heads=4))
clip = CLIPTextModel(CLIPTextConfig(vocab_size=64, bos_token_id=1, eos_token_id=2, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4))
backbone = PixArtTransformer2DModel(
    num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, num_layers=8, sample_size=8, caption_channels=64, use_additional_conditions=False
)


def largest_group(model, kind):
    """The share of the model's parameters that is loaded at once."""
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1)
    groups = {}
    for module in model.modules():
        hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if hook is not None:
            parts = [p for each in hook.group.modules for p in each.parameters()] + list(hook.group.parameters)
            groups[id(hook.group)] = sum(p.numel() for p in {id(p): p for p in parts}.values())
    return max(groups.values()) / sum(p.numel() for p in model.parameters()), len(groups)


shares = {}
for model in (t5, clip, backbone):
    share, count = largest_group(model, "block_level")
    shares[type(model).__name__] = share
    print(f"{type(model).__name__:26} 8 blocks, block_level: {count} groups, the largest holds {share:.0%} of the parameters")
assert shares["T5EncoderModel"] == shares["CLIPTextModel"] == 1 and shares["PixArtTransformer2DModel"] < 0.5
EOF
