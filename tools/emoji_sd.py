"""`emoji-sd`: a small Stable Diffusion 1.x: its UNet with cross-attention and skips, its CLIP text encoder."""

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from emoji_data import TEXT_LENGTH
from emoji_vae import LATENT_CHANNELS
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH, DEPTH = 64, 1


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="quick_gelu",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def make_denoiser(width: int, depth: int) -> UNet2DConditionModel:
    """SD 1.5's blocks at 8, 4 and 2 pixels, the last without attention. Branches and the output start at zero."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=depth,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, as in SD 1.5
    )
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Transformer2DModel):
            torch.nn.init.zeros_(module.proj_out.weight)
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def matrices(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """The weights that Muon trains: those of the transformers, whose projections are 1x1 convolutions."""
    return [p for name, p in unet.named_parameters() if "transformer_blocks" in name and p.ndim == 2]


def predict(
    text: CLIPTextModel, unet: UNet2DConditionModel, noisy: Tensor, ids: Tensor, mask: Tensor, t: Tensor
) -> Tensor:
    """Velocity, as the pipeline computes it: with padding, which Stable Diffusion does not mask."""
    return unet(noisy, t, encoder_hidden_states=text(ids)[0], return_dict=False)[0]


def make_pipeline(tokenizer, text, vae, unet, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
