"""Tiny Flux.1 dev: joint blocks, then single ones; guidance is an input."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.tiny.parts import TEXT, clip_config, finished, t5, tokenizer, vae


def tiny_flux(folder: Path | None = None, *, seed: int = 0) -> FluxPipeline:
    """FluxPipeline with two blocks of each kind; its latents are packed, four neighbours in one token."""
    torch.manual_seed(seed)
    words, plain_words = tokenizer(bos=True), tokenizer(bos=False)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return finished(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae(32, shift_factor=0.1),
            text_encoder=CLIPTextModel(clip_config(words)),
            tokenizer=words,
            text_encoder_2=t5(plain_words),
            tokenizer_2=plain_words,
            transformer=transformer,
        ),
        folder,
    )
