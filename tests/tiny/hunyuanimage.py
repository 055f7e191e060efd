"""Tiny HunyuanImage 2.1: blocks as those of Flux.1, text refined before them, guidance by an object of the pipeline."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from transformers import ByT5Tokenizer

from tests.tiny.parts import TEXT, TOKENS, finished, qwen_vl, t5, tokenizer

LATENTS = 8


def tiny_hunyuanimage(folder: Path | None = None, *, seed: int = 0) -> HunyuanImagePipeline:
    """HunyuanImagePipeline with two blocks of each kind; built here its texts are short, as loaded they are padded."""
    torch.manual_seed(seed)
    words, letters = tokenizer(bos=False), ByT5Tokenizer(extra_ids=0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        rope_axes_dim=(8, 8),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENTS,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen_vl(words),
        tokenizer=words,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(),
    )
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = TOKENS
    return finished(pipeline, folder)
