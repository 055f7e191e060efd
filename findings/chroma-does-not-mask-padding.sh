#!/usr/bin/env bash
# diffusers 0.42.1: ChromaPipeline hands its transformer a mask of ones and zeros in floating point (transformers 5.23.0, torch 2.13.0)
#
# Expected: of the padding behind a prompt one token is seen, as Chroma was trained, and the rest is masked out: what stands in it changes nothing.
# Happens: the mask is made in the dtype of the model, so attention adds it as a bias: tokens of the prompt get +1, those of the padding +0, and none
# is masked. Other values in the padding change the prediction; with the same mask as booleans they do not.
# Where: pipelines/chroma/pipeline_chroma.py, _get_t5_prompt_embeds (`.to(dtype=dtype)`) and _prepare_attention_mask, whose cat with booleans gives floats.
# Means: with short prompts most of the 512 tokens that attention reads are padding; images are others than those of the model's authors' code. It was
# reported as huggingface/diffusers#12116, which is closed.
#
# Guess before running: the padding changes nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>"$dir/python.log" <<'EOF' || { cat "$dir/python.log" >&2; exit 1; }
import diffusers, torch, transformers
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "apple": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
pipe = ChromaPipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(block_out_channels=(32,), latent_channels=4),
    text_encoder=T5EncoderModel(T5Config(vocab_size=8, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)),
    tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
    transformer=ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2,
    ).eval(),
)
pipe.set_progress_bar_config(disable=True)
calls = []
pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
pipe("red apple", height=32, width=32, num_inference_steps=1, guidance_scale=1.0, output_type="latent", max_sequence_length=16)
given = calls[0]
mask, text = given["attention_mask"], given["encoder_hidden_states"]
other = text.clone()
other[:, 4:] += 10  # "red", "apple", the end and one token of padding are before
changes = {}
for kind in (mask, mask.bool()):
    with torch.no_grad():
        first, second = (pipe.transformer(**{**given, "attention_mask": kind, "encoder_hidden_states": one})[0] for one in (text, other))
    changes[kind.dtype] = ((first - second).norm() / first.norm()).item()
    print(f"mask {kind.dtype}, {int(kind[0, :16].sum())} of 16 tokens of text: other padding changes the prediction by {changes[kind.dtype]:.1e} of its norm")
assert mask.dtype == torch.float32 and changes[torch.float32] > 1e-3 and changes[torch.bool] == 0
EOF
