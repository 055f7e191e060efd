"""What the tiny pipelines are put together from: tokenizers, text encoders, autoencoders."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "red", "green", "blue", "apple", "cat", "house", "tree", "boat", "face", "on", "the", "with", "and", ","]
TOKENS = 16
IMAGE_TOKEN = "<|image_pad|>"
TEXT = 32  # channels of every text encoder


def finished(pipeline: DiffusionPipeline, folder: Path | None) -> DiffusionPipeline:
    """The pipeline in eval mode and quiet, saved to `folder` if there is one."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Whole words; `bos` puts a start before them, as CLIP does and T5 does not."""
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=TOKENS,
    )


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5(tokenizer: PreTrainedTokenizerFast, channels: int = TEXT, blocks: int = 1) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=channels,
            d_kv=16,
            d_ff=64,
            num_layers=blocks,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def qwen_vl(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A language model that could see images as well."""
    vocabulary = tokenizer.get_vocab()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "hidden_size": TEXT,
                "intermediate_size": 2 * TEXT,
                "num_hidden_layers": 3,
                "max_window_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            },
            vision_config=vision,
            **({"image_token_id": vocabulary[IMAGE_TOKEN]} if IMAGE_TOKEN in vocabulary else {}),
        )
    )


def vae(image_size: int, levels: int = 2, kind: type[ModelMixin] = AutoencoderKL, **config) -> Any:
    """An autoencoder of a kind to 4 latent channels, each side divided by 2 ** (levels - 1)."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16,) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=image_size,
        **{"latent_channels": 4} | config,
    )
