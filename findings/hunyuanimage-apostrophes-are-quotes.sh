#!/usr/bin/env bash
# diffusers 0.42.1: HunyuanImagePipeline takes what stands between two apostrophes for text to be written into the image (torch 2.13.0)
#
# Expected: what a prompt quotes is given to the glyph encoder; "a cat's toy on a dog's bed" quotes nothing.
# Happens: everything from one apostrophe to the next is taken as quoted. One apostrophe alone does nothing, two do.
# Where: pipelines/hunyuan_image/pipeline_hunyuanimage.py, extract_glyph_text: the pattern of single quotes asks for no word boundary.
# Means: prompts with two genitives or contractions ask the model for lettering that nobody wants, and, where the pipeline has an ocr_guider, the whole
# batch is guided by it as soon as one prompt is such.
#
# Guess before running: None for the second prompt, as for the first.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'EOF' || { cat "$dir/python.log" >&2; exit 1; }
import diffusers
from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

print("diffusers", diffusers.__version__)
prompts = ("a cat's toy", "a cat's toy on a dog's bed", 'a sign that says "open"')
found = [extract_glyph_text(prompt) for prompt in prompts]
for prompt, text in zip(prompts, found):
    print(f"{prompt!r}: {text!r}")
assert found[0] is None and "s toy on a dog" in found[1] and "open" in found[2]
EOF
