"""Tiny Chroma: the blocks of Flux.1, and one network that makes the modulation of all of them."""

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.tiny.parts import TEXT, finished, t5, tokenizer, vae


def tiny_chroma(folder: Path | None = None, *, seed: int = 0) -> ChromaPipeline:
    """ChromaPipeline with two blocks of each kind; its latents are packed, four neighbours in one token."""
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    return finished(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae(32, shift_factor=0.1),
            text_encoder=t5(words),
            tokenizer=words,
            transformer=transformer,
        ),
        folder,
    )
