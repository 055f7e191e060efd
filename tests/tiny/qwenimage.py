"""Tiny Qwen-Image: joint blocks, texts as long as the longest prompt of a call, guidance by a second call."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.tiny.parts import TEXT, finished, qwen_vl, tokenizer

LATENTS = 4


def tiny_qwenimage(folder: Path | None = None, *, seed: int = 0, **config: Any) -> QwenImagePipeline:
    """QwenImagePipeline with three blocks; its latents are packed, four neighbours in one token."""
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENTS,
        out_channels=LATENTS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        **config,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENTS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
    )
    return finished(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=qwen_vl(words),
            tokenizer=words,
            transformer=transformer,
        ),
        folder,
    )
