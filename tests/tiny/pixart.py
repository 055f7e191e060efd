"""Tiny PixArt-alpha, with and without micro-conditions, and PixArt-Sigma."""

from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.tiny.parts import TEXT, finished, t5, tokenizer, vae


def tiny_pixart(
    folder: Path | None = None, *, width: int = 32, blocks: int = 1, latent_size: int = 16, seed: int = 0
) -> PixArtSigmaPipeline:
    """PixArtSigmaPipeline with `blocks` blocks of `width` channels (a multiple of 16); 2 * `latent_size` pixels."""
    torch.manual_seed(seed)
    return finished(PixArtSigmaPipeline(**_parts(width, blocks, latent_size)), folder)


def tiny_pixart_alpha(folder: Path | None = None, *, seed: int = 0) -> PixArtAlphaPipeline:
    """PixArtAlphaPipeline as at 512 pixels: the backbone is told neither size nor aspect ratio."""
    torch.manual_seed(seed)
    return finished(PixArtAlphaPipeline(**_parts(32, 2, 16)), folder)


def tiny_pixart_alpha_1024(folder: Path | None = None, *, seed: int = 0) -> PixArtAlphaPipeline:
    """PixArtAlphaPipeline as at 1024 pixels: the pipeline tells the backbone size and aspect ratio.

    It does so where `sample_size` is 128. The embeddings of the two take a third of the channels each.
    """
    torch.manual_seed(seed)
    return finished(PixArtAlphaPipeline(**_parts(48, 2, 128, use_additional_conditions=True)), folder)


def _parts(width: int, blocks: int, latent_size: int, use_additional_conditions: bool = False) -> dict:
    words = tokenizer(bos=False)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 16,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=latent_size,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        use_additional_conditions=use_additional_conditions,
        interpolation_scale=1,
    )
    return {
        "tokenizer": words,
        "text_encoder": t5(words),
        "vae": vae(2 * latent_size),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(num_train_timesteps=1000, algorithm_type="dpmsolver++"),
    }
