"""Tiny Sana: linear attention, a convolutional feed-forward, a language model for text, a deep autoencoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.tiny.parts import TEXT, finished, tokenizer


def tiny_sana(folder: Path | None = None, *, seed: int = 0) -> SanaPipeline:
    """SanaPipeline with two blocks on latents of half the image's sides."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=16,
    )
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=words.pad_token_id,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    )
    return finished(
        SanaPipeline(
            tokenizer=words,
            text_encoder=gemma,
            vae=autoencoder,
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ),
        folder,
    )
