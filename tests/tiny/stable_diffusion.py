"""Tiny Stable Diffusion 1.5, XL (UNets) and 3 (joint transformer blocks)."""

from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny.parts import TEXT, clip_config, finished, t5, tokenizer, vae


def tiny_sd(
    folder: Path | None = None, *, width: int = 32, latent_size: int = 16, seed: int = 0
) -> StableDiffusionPipeline:
    """StableDiffusionPipeline whose UNet has every layer kind of SD 1.5: resnets, attention, down and up samplers."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    return finished(
        StableDiffusionPipeline(
            vae=vae(2 * latent_size),
            text_encoder=CLIPTextModel(clip_config(words)),
            tokenizer=words,
            unet=_unet(width, latent_size, cross_attention_dim=TEXT),
            scheduler=DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        folder,
    )


def tiny_sdxl(
    folder: Path | None = None, *, width: int = 32, latent_size: int = 16, seed: int = 0
) -> StableDiffusionXLPipeline:
    """StableDiffusionXLPipeline: two text encoders, Linear projections, transformers of two blocks, sizes as inputs."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    unet = _unet(
        width,
        latent_size,
        cross_attention_dim=2 * TEXT,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
    )
    return finished(
        StableDiffusionXLPipeline(
            vae=vae(2 * latent_size),
            text_encoder=CLIPTextModel(clip_config(words)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(words)),
            tokenizer=words,
            tokenizer_2=tokenizer(bos=True),
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False),
        ),
        folder,
    )


def tiny_sd3(folder: Path | None = None, *, channels: int = 4, seed: int = 0) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline with one block of 3.5's kind (a second attention of the image alone) and one of 3's.

    The last block returns no text stream.
    """
    torch.manual_seed(seed)
    words, plain_words = tokenizer(bos=True), tokenizer(bos=False)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT,
        out_channels=channels,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return finished(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(32, latent_channels=channels, shift_factor=0.1),
            text_encoder=CLIPTextModelWithProjection(clip_config(words)),
            tokenizer=words,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(words)),
            tokenizer_2=tokenizer(bos=True),
            text_encoder_3=t5(plain_words, 2 * TEXT),
            tokenizer_3=plain_words,
        ),
        folder,
    )


def _unet(width: int, latent_size: int, **config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **config,
    )
