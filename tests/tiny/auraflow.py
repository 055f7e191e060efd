"""Tiny AuraFlow: joint blocks, then single ones; guidance in rows."""

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny.parts import TEXT, finished, tokenizer, vae


def tiny_auraflow(folder: Path | None = None, *, seed: int = 0) -> AuraFlowPipeline:
    """AuraFlowPipeline with two blocks of each kind."""
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(words),
            d_model=TEXT,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return finished(
        AuraFlowPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            vae=vae(32),
            text_encoder=text_encoder,
            tokenizer=words,
            transformer=transformer,
        ),
        folder,
    )
