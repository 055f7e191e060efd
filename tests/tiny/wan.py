"""Tiny Wan: videos of a few frames, guidance by a second call, one expert or two."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny.parts import TEXT, finished, tokenizer

LATENTS = 4


def tiny_wan(folder: Path | None = None, *, seed: int = 0, experts: int = 1) -> WanPipeline:
    """WanPipeline with three blocks an expert; a latent frame stands for two frames, and a side for half.

    Of two experts the second computes the timesteps below 800, that is the second of two steps, and three of four.
    """
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    transformers = [_transformer() for _ in range(experts)]
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENTS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(words),
            d_model=TEXT,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    return finished(
        WanPipeline(
            tokenizer=words,
            text_encoder=encoder,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformers[0],
            transformer_2=transformers[1] if experts > 1 else None,
            boundary_ratio=0.8 if experts > 1 else None,
        ),
        folder,
    )


def tiny_wan_22(folder: Path | None = None) -> WanPipeline:
    """WanPipeline with two experts."""
    return tiny_wan(folder, experts=2)


def tiny_wan_5b(folder: Path | None = None) -> WanPipeline:
    """WanPipeline that gives its transformer a timestep for every token."""
    pipeline = tiny_wan()
    pipeline.register_to_config(expand_timesteps=True)
    return finished(pipeline, folder)


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    )
