"""`emoji-pixart`: a small PixArt-Sigma with a T5 text encoder."""

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from emoji_vae import LATENT_CHANNELS
from torch import Tensor
from transformers import T5Config, T5EncoderModel

WIDTH, DEPTH = 256, 5


def make_text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def make_denoiser(width: int, depth: int) -> PixArtTransformer2DModel:
    """16 tokens of 2x2 latents. Residual branches and the output start at zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # the second half is PixArt's learned variance; the pipeline drops it
        num_layers=depth,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=128,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    for block in transformer.transformer_blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def matrices(transformer: PixArtTransformer2DModel) -> list[torch.nn.Parameter]:
    """The weights that Muon trains."""
    return [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]


def predict(
    text: T5EncoderModel, transformer: PixArtTransformer2DModel, noisy: Tensor, ids: Tensor, mask: Tensor, t: Tensor
) -> Tensor:
    """Velocity, as the pipeline computes it: padding is masked, and the learned variance is dropped."""
    return transformer(
        noisy,
        encoder_hidden_states=text(ids, attention_mask=mask)[0],
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0][:, :LATENT_CHANNELS]


def make_pipeline(tokenizer, text, vae, transformer, scheduler) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler
    )
