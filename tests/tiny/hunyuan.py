"""Tiny HunyuanDiT 1.1 (style and image size are inputs) and 1.2."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel

from tests.tiny.parts import TEXT, finished, t5, tokenizer, vae

# The pipeline pads prompts to these lengths.
BERT_TOKENS, T5_TOKENS = 77, 256


def tiny_hunyuan(folder: Path | None = None, *, seed: int = 0) -> HunyuanDiTPipeline:
    """HunyuanDiTPipeline 1.2 with six blocks: the last two read skips from the second and the first."""
    return _tiny(folder, seed, use_style_cond_and_image_meta_size=False)


def tiny_hunyuan_11(folder: Path | None = None, *, seed: int = 0) -> HunyuanDiTPipeline:
    """HunyuanDiTPipeline 1.1, as 1.2 but told style, size and crop of the image."""
    return _tiny(folder, seed, use_style_cond_and_image_meta_size=True)


def _tiny(folder: Path | None, seed: int, use_style_cond_and_image_meta_size: bool) -> HunyuanDiTPipeline:
    torch.manual_seed(seed)
    words, plain_words = tokenizer(bos=True), tokenizer(bos=False)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT,
        pooled_projection_dim=TEXT,
        text_len=BERT_TOKENS,
        text_len_t5=T5_TOKENS,
        use_style_cond_and_image_meta_size=use_style_cond_and_image_meta_size,
    )
    bert = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=TEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=2 * TEXT,
            max_position_embeddings=BERT_TOKENS,
            pad_token_id=words.pad_token_id,
        )
    )
    return finished(
        HunyuanDiTPipeline(
            vae=vae(64, levels=4),  # the pipeline makes the rotary table for latents of an eighth of the image
            text_encoder=bert,
            tokenizer=words,
            text_encoder_2=t5(plain_words),
            tokenizer_2=plain_words,
            transformer=transformer,
            scheduler=DDPMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.02,
                prediction_type="v_prediction",
                clip_sample=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        folder,
    )
