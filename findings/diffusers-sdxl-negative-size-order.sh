#!/usr/bin/env bash
# diffusers 0.42.1: StableDiffusionXLPipeline with negative sizes and a batch of two (torch 2.13.0, transformers 5.23.0)
#
# Expected: negative_original_size and negative_target_size reach the unconditional half of the batch, original_size and target_size the
# other half, so that each image is the one that its prompt gives alone from the same noise.
# Happens: the UNet gets the latents and the texts in the order "unconditional, unconditional, conditional, conditional" and the sizes in
# the order "negative, positive, negative, positive". Of two images, the first is conditioned on the negative size and the second is
# guided away from the positive one. Without negative sizes all rows are equal, and the images are right. One of the two negative sizes
# without the other is dropped, with no warning.
# Where: __call__ puts the negative row before the positive one and then repeats the two rows together.
# Means: with negative sizes, SDXL's images depend on the batch, with no error. A reference recorded at one batch size and compared with
# a quantized model at another differs beyond what rounding explains. Record and compare with the same batches, or pass no negative sizes.
#
# Guess before running: rows 1 and 2 of four are exchanged, and both images differ from those made one by one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import diffusers, torch, transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

print("diffusers", diffusers.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
PROMPTS = ["fox", "owl"]
vocabulary = {word: number for number, word in enumerate(["[pad]", "[end]", "[unknown]", *PROMPTS])}


def words():
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]", unk_token="[unknown]", model_max_length=8)


torch.manual_seed(0)
text = CLIPTextConfig(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      max_position_embeddings=8, projection_dim=32, bos_token_id=1, eos_token_id=1, pad_token_id=0)
unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, norm_num_groups=4, cross_attention_dim=64,
                            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
autoencoder = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
pipeline = StableDiffusionXLPipeline(vae=autoencoder, text_encoder=CLIPTextModel(text).eval(), text_encoder_2=CLIPTextModelWithProjection(text).eval(),
                                     tokenizer=words(), tokenizer_2=words(), unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False))
pipeline.set_progress_bar_config(disable=True)
calls = []
unet.register_forward_pre_hook(lambda module, arguments, named: calls.append(named["added_cond_kwargs"]), with_kwargs=True)
noise = torch.randn(2, 4, 8, 8)


def images(prompts, noise, **options):
    return pipeline(prompts, latents=noise, height=16, width=16, num_inference_steps=2, guidance_scale=5.0, original_size=(1024, 1024),
                    target_size=(1024, 1024), output_type="latent", **options).images


NEGATIVE = {"negative_original_size": (256, 256), "negative_target_size": (512, 512)}
for name, options, expected in (
    ("no negative size", {}, [1024] * 4),
    ("both negative sizes", NEGATIVE, [256, 256, 1024, 1024]),
    ("negative_original_size alone", {"negative_original_size": (256, 256)}, [256, 256, 1024, 1024]),
):
    together = images(PROMPTS, noise, **options)
    sizes, texts = calls[-1]["time_ids"][:, 0].int().tolist(), calls[-1]["text_embeds"]
    assert torch.allclose(texts[0], texts[1]) and not torch.allclose(texts[2], texts[3])  # two empty prompts, then the two prompts
    separate = torch.cat([images(prompt, noise[row : row + 1], **options) for row, prompt in enumerate(PROMPTS)])
    alone = calls[-1]["time_ids"][:, 0].int().tolist()
    differences = ((together - separate).flatten(1).abs().amax(1) / separate.std()).tolist()
    print(f"{name}: original sizes by row {sizes}, expected {expected}, of one prompt alone {alone}")
    print("  largest difference from the same prompt alone, in standard deviations:", ", ".join(f"{difference:.1e}" for difference in differences))
    if options == NEGATIVE:
        assert alone == [256, 1024] and sizes == [256, 1024, 256, 1024] and min(differences) > 1e-3, (alone, sizes, differences)
    else:  # a lone negative_original_size is dropped, also for one prompt
        assert alone == [1024, 1024] and sizes == [1024] * 4 and max(differences) < 1e-4, (alone, sizes, differences)
EOF
