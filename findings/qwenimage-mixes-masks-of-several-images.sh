#!/usr/bin/env bash
# diffusers 0.42.1: QwenImagePipeline gives images of several prompts the mask of another prompt (torch 2.13.0)
#
# Expected: with num_images_per_prompt=2 the rows of the mask belong to the rows of the embeddings: first prompt, first prompt, second, second.
# Happens: embeddings come in that order, masks as first, second, first, second: the second row masks the first prompt's text as if it were the second's.
# Where: pipelines/qwenimage/pipeline_qwenimage.py, encode_prompt: the mask (rows, tokens) is repeated with three sizes, which adds a dimension in front, and
# then viewed as rows; the embeddings have three dimensions, of which the second is repeated.
# Means: of a call with several prompts of different lengths and several images of each, half of the images read padding as text, or miss the end of theirs.
# One prompt, one image a prompt, or prompts of one length are not affected.
#
# Guess before running: rows of the mask belong to rows of the embeddings.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'PY' || { cat "$dir/python.log" >&2; exit 1; }
import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

print("diffusers", diffusers.__version__, "torch", torch.__version__)
pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=None)
lengths = torch.tensor([3, 5])
mask = torch.arange(5) < lengths[:, None]
embeddings = lengths.view(2, 1, 1).expand(2, 5, 8).float()  # each row holds the number of its own tokens
rows, masks = pipe.encode_prompt(None, device="cpu", num_images_per_prompt=2, prompt_embeds=embeddings, prompt_embeds_mask=mask)
of_rows, of_masks = rows[:, 0, 0].long().tolist(), masks.sum(1).tolist()
print("tokens of the embeddings", of_rows, "of the masks", of_masks)
assert of_rows == [3, 3, 5, 5] and of_masks == [3, 5, 3, 5]
PY
