"""Tiny CogView4: texts padded on the left to a multiple of 16 tokens, without a mask; guidance by a second call."""

from pathlib import Path

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tests.tiny.parts import TEXT, finished, tokenizer, vae


def tiny_cogview4(folder: Path | None = None, *, seed: int = 0) -> CogView4Pipeline:
    """CogView4Pipeline with three blocks."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    words.padding_side = "left"
    text_encoder = GlmModel(
        GlmConfig(
            vocab_size=len(words),
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=32,
        condition_dim=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    return finished(
        CogView4Pipeline(
            tokenizer=words,
            text_encoder=text_encoder,
            vae=vae(32),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
            ),
        ),
        folder,
    )
