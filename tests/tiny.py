"""Tiny untrained diffusers pipelines, built offline: every class is the real one, only the widths are small.

Each builder returns the pipeline in float32 with weights drawn from `seed`, and saves it when given a folder.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dmquant.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "red", "green", "blue", "apple", "cat", "house", "tree", "boat", "face", "on", "the", "with", "and", ","]
TOKENS = 16

# What a tiny PixArt pipeline needs in its call besides prompt, size, steps and guidance.
PIXART_CALL = {"max_sequence_length": TOKENS, "clean_caption": False, "use_resolution_binning": False}
IMAGE_SIZE = 32


def tiny_pixart(
    folder: Path | None = None, *, width: int = 32, blocks: int = 1, latent_size: int = 16, seed: int = 0
) -> PixArtSigmaPipeline:
    """PixArtSigmaPipeline with `blocks` blocks of `width` channels (a multiple of 16); 2 * `latent_size` pixels."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(bos=False)
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
        caption_channels=32,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, algorithm_type="dpmsolver++")
    return _finished(
        PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=_vae(2 * latent_size),
            transformer=transformer,
            scheduler=scheduler,
        ),
        folder,
    )


def tiny_sd(folder: Path | None = None, *, width: int = 32, latent_size: int = 16, seed: int = 0):
    """StableDiffusionPipeline whose UNet has every layer kind of SD 1.5: resnets, attention, down and up samplers."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(bos=True)
    return _finished(
        StableDiffusionPipeline(
            vae=_vae(2 * latent_size),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)),
            tokenizer=tokenizer,
            unet=_unet(width, latent_size, cross_attention_dim=32),
            scheduler=DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        folder,
    )


def tiny_sdxl(folder: Path | None = None, *, width: int = 32, latent_size: int = 16, seed: int = 0):
    """StableDiffusionXLPipeline: two text encoders, Linear projections and the added size conditioning."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(bos=True)
    unet = _unet(
        width,
        latent_size,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return _finished(
        StableDiffusionXLPipeline(
            vae=_vae(2 * latent_size),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=_tokenizer(bos=True),
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False),
        ),
        folder,
    )


def _finished(pipeline: DiffusionPipeline, folder: Path | None) -> DiffusionPipeline:
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


def _tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=TOKENS,
    )


def _clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(image_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=image_size,
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
