#!/usr/bin/env bash
# diffusers 0.42.1: several images of several prompts with SanaPipeline and HunyuanDiTPipeline (torch 2.13.0, transformers 5.23.0)
#
# Expected: with two prompts and num_images_per_prompt=2, encode_prompt returns embeddings and attention masks in one order, and each
# image is the one that its prompt gives alone from the same noise.
# Happens: the embeddings come in the order 0 0 1 1 and the masks in the order 0 1 0 1. The second and the third image are made with the
# other prompt's mask: the longer prompt is cut, the shorter one goes on into its padding. PixArt-Sigma's masks are in order.
# Where: encode_prompt repeats the batch of masks as a whole, and each embedding beside itself. The same lines stand in the pipelines of
# AuraFlow, Kandinsky 3, LTX, Lumina, Mochi and PRX (read, not run).
# Means: prompts of unequal length, several images each, give other images in a batch than one by one, with no error. Whoever calibrates
# or measures a quantized model that way does so under conditions that no prompt has. Keep to one image a prompt, or one prompt a call.
#
# Guess before running: rows 1 and 2 of four get the other prompt's mask, and only those images differ.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import diffusers, torch, transformers
from diffusers import DDIMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

print("diffusers", diffusers.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
PROMPTS = ["fox", "an old fox in the snow by night"]
vocabulary = {word: number for number, word in enumerate(["[pad]", "[end]", "[unknown]", *dict.fromkeys(" ".join(PROMPTS).split())])}


def words():
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [end]", special_tokens=[("[end]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]", unk_token="[unknown]", model_max_length=64)


def t5():
    return T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))


def sana():
    config = Gemma2Config(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    model = SanaTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_cross_attention_heads=2,
                                   cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32, sample_size=8)
    return SanaPipeline(tokenizer=words(), text_encoder=Gemma2Model(config), vae=None, transformer=model, scheduler=DDIMScheduler(clip_sample=False))


def hunyuan():
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0)
    model = HunyuanDiT2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, mlp_ratio=2.0,
                              cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=32, text_len=77, text_len_t5=256)
    return HunyuanDiTPipeline(vae=None, text_encoder=BertModel(config), tokenizer=words(), text_encoder_2=t5(), tokenizer_2=words(), transformer=model,
                              scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def pixart():
    model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
                                     sample_size=8, patch_size=2, caption_channels=32, use_additional_conditions=False)
    return PixArtSigmaPipeline(tokenizer=words(), text_encoder=t5(), vae=None, transformer=model, scheduler=DDIMScheduler(clip_sample=False))


for name, build, options, side, order in (
    ("SanaPipeline", sana, {"complex_human_instruction": None}, 32 * 8, [0, 1, 0, 1]),
    ("HunyuanDiTPipeline", hunyuan, {}, 8 * 8, [0, 1, 0, 1]),
    ("PixArtSigmaPipeline", pixart, {"clean_caption": False}, 8 * 8, [0, 0, 1, 1]),
):
    torch.manual_seed(0)
    pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)

    def encoded(prompts, images):
        with torch.no_grad():
            outputs = [output for output in pipeline.encode_prompt(prompts, num_images_per_prompt=images, do_classifier_free_guidance=False, **options) if output is not None]
        (embeddings,), (mask,) = ([output for output in outputs if output.ndim == dimensions] for dimensions in (3, 2))
        return embeddings, mask

    def images(prompts, noise):
        return pipeline(prompts, num_images_per_prompt=2, latents=noise, num_inference_steps=2, guidance_scale=4.0, height=side, width=side,
                        use_resolution_binning=False, output_type="latent", **options).images

    alone = [encoded(prompt, 1) for prompt in PROMPTS]
    together = encoded(PROMPTS, 2)
    rows = [[next(number for number, single in enumerate(alone) if torch.allclose(single[kind][0], row, atol=1e-4)) for row in together[kind]] for kind in (0, 1)]
    print(f"{name}: the prompts of the embeddings {rows[0]}, of the masks {rows[1]}")
    assert rows == [[0, 0, 1, 1], order], rows

    noise = torch.randn(4, 4, 8, 8)
    separate = torch.cat([images(PROMPTS[0], noise[:2]), images(PROMPTS[1], noise[2:])])
    differences = (images(PROMPTS, noise) - separate).flatten(1).abs().amax(1) / separate.std()
    print("  largest difference from the same prompt alone, in standard deviations:", ", ".join(f"{difference:.1e}" for difference in differences))
    assert [bool(difference > 1e-3) for difference in differences] == [mask != embeddings for embeddings, mask in zip(*rows)], differences
EOF
