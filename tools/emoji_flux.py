"""`emoji-flux`: a small FLUX.1 with a CLIP and a T5 text encoder, trained by flow matching.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206: straight
paths from noise to latents, and shares of noise that are logit-normal, with a mean of 0 and a deviation of 1.
"""

import emoji_pixart
import emoji_sd
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_vae import LATENT_CHANNELS
from torch import Tensor, nn

WIDTH, DEPTH = 192, 6
DOUBLE = 2  # blocks with a stream for text and one for the image, before `depth` single ones
HEAD = 32
HELD_OUT = 64  # captions that are not trained on, with their images


def make_text_encoder(vocabulary: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"clip": emoji_sd.make_text_encoder(vocabulary), "t5": emoji_pixart.make_text_encoder(vocabulary)}
    )


def make_denoiser(width: int, depth: int) -> FluxTransformer2DModel:
    """16 tokens of 2x2 latents. Residual branches and the output start at zero."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE,
        num_single_layers=depth,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    last = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        last += [block.norm1.linear, block.norm1_context.linear]
    last += [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in last:  # gates among them, so that a block begins as the identity
        nn.init.zeros_(layer.weight)
    return transformer


def matrices(transformer: FluxTransformer2DModel) -> list[nn.Parameter]:
    """The weights that Muon trains."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    return [p for block in blocks for p in block.parameters() if p.ndim == 2]


def pack(latents: Tensor) -> Tensor:
    """Latents (N, channels, 8, 8) as tokens of 2x2, (N, 16, 4 channels), as the pipeline packs them."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def predict(
    text: nn.ModuleDict, transformer: FluxTransformer2DModel, noisy: Tensor, ids: Tensor, mask: Tensor, t: Tensor
) -> Tensor:
    """Velocity in latents (N, channels, 8, 8), as the pipeline computes it: padding is seen; `t` is in 0..1000."""
    rows, side = len(noisy), noisy.shape[-1] // 2
    states = text["t5"](ids)[0]
    tokens = transformer(
        hidden_states=pack(noisy),
        encoder_hidden_states=states,
        pooled_projections=text["clip"](ids).pooler_output,
        timestep=t / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, side, side, noisy.device, noisy.dtype),
        txt_ids=torch.zeros(ids.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(tokens, 16 * side, 16 * side, 8)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def make_pipeline(tokenizer, text, vae, transformer, scheduler) -> FluxPipeline:
    vae.register_to_config(shift_factor=0.0)  # which FluxPipeline adds
    return FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=text["clip"],
        text_encoder_2=text["t5"],
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
