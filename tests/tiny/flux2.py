"""Tiny Flux.2: dev, whose guidance is an input, and klein, distilled to do without."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny.parts import TEXT, finished, tokenizer, vae

LAYERS = 30  # the pipelines read text encoders after layers 9 to 30
LENGTH = 64  # tokens: there is a system message before dev's prompts
DEV_TALK = "{% for said in messages %}{% for part in said['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
KLEIN_TALK = "{% for said in messages %}user {{ said['content'] }}{% endfor %} assistant"


def _language_model(words: Any) -> dict[str, Any]:
    """Configuration of a language model that is as narrow as it is deep."""
    return {
        "vocab_size": len(words),
        "hidden_size": TEXT // 2,
        "intermediate_size": TEXT,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }


def _parts(guidance_embeds: bool) -> dict[str, Any]:
    """All but tokenizer and text encoder: two blocks of each kind; a token is four pixels of the latents."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae(32, kind=AutoencoderKLFlux2),
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT // 2,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }


def tiny_flux2(folder: Path | None = None, *, seed: int = 0) -> Flux2Pipeline:
    """Flux2Pipeline, as dev; of its text encoder, which could see images as well, the text half alone is used."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    words.model_max_length = LENGTH
    words.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_language_model(words)},
        vision_config={"model_type": "pixtral", "head_dim": 8, "image_size": 32, "patch_size": 16, **vision},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    return finished(
        Flux2Pipeline(
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=PixtralProcessor(PixtralImageProcessor(), words, chat_template=DEV_TALK),
            **_parts(guidance_embeds=True),
        ),
        folder,
    )


def tiny_flux2_klein(folder: Path | None = None, *, seed: int = 0, distilled: bool = True) -> Flux2KleinPipeline:
    """Flux2KleinPipeline, as klein 4B, or as its base model, whose guidance takes a second call a step."""
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    words.chat_template = KLEIN_TALK
    return finished(
        Flux2KleinPipeline(
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**_language_model(words))),
            tokenizer=words,
            is_distilled=distilled,
            **_parts(guidance_embeds=False),
        ),
        folder,
    )
