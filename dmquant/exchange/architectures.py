"""Which model a file is of, by the names of its tensors: a guess, by tensors that only that architecture has."""

from collections.abc import Iterable

from dmquant.exchange.applying import PREFIXES

_ARCHITECTURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Flux.2 (original names)", ("double_blocks.0.img_attn.qkv", "double_stream_modulation_img.lin")),
    ("Chroma (original names)", ("double_blocks.0.img_attn.qkv", "distilled_guidance_layer.in_proj")),
    ("HunyuanVideo (original names)", ("double_blocks.0.img_attn_qkv",)),
    ("Flux.1 (original names)", ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")),
    ("Flux.2 (diffusers' names)", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",)),
    ("Chroma (diffusers' names)", ("single_transformer_blocks.0.attn.to_q", "distilled_guidance_layer.in_proj")),
    (
        "HunyuanImage (diffusers' names)",
        ("transformer_blocks.0.attn.add_q_proj", "context_embedder.proj_in", "x_embedder.proj"),
    ),
    ("Flux.1 (diffusers' names)", ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")),
    ("Stable Diffusion 3 (original names)", ("joint_blocks.0.x_block.attn.qkv",)),
    ("Qwen-Image (diffusers' names)", ("transformer_blocks.0.img_mod.1", "transformer_blocks.0.attn.add_q_proj")),
    (
        "CogView4 (diffusers' names)",
        ("transformer_blocks.0.attn1.to_q", "time_condition_embed.timestep_embedder.linear_1"),
    ),
    ("AuraFlow (diffusers' names)", ("joint_transformer_blocks.0.attn.add_q_proj", "time_step_proj.linear_1")),
    ("Stable Diffusion 3 (diffusers' names)", ("transformer_blocks.0.attn.add_q_proj", "pos_embed.proj")),
    ("Stable Diffusion XL (original names)", ("input_blocks.1.0.in_layers.2", "label_emb.0.0")),
    ("Stable Diffusion 1 or 2 (original names)", ("input_blocks.1.0.in_layers.2",)),
    ("Stable Diffusion XL (diffusers' names)", ("down_blocks.0.resnets.0.conv1", "add_embedding.linear_1")),
    ("Stable Diffusion 1 or 2 (diffusers' names)", ("down_blocks.0.resnets.0.conv1", "time_embedding.linear_1")),
    ("Sana (diffusers' names)", ("transformer_blocks.0.ff.conv_inverted",)),
    ("PixArt (diffusers' names)", ("transformer_blocks.0.attn2.to_q", "adaln_single.linear", "pos_embed.proj")),
    ("PixArt or Sana (original names)", ("blocks.0.cross_attn.q_linear",)),
    ("HunyuanDiT (diffusers' names)", ("blocks.0.attn1.to_q", "text_embedder.linear_1", "pos_embed.proj")),
    ("Wan (original names)", ("blocks.0.self_attn.q", "blocks.0.cross_attn.q")),
    ("Wan (diffusers' names)", ("blocks.0.attn1.to_q", "condition_embedder.time_embedder.linear_1")),
    ("Lumina 2 or Z-Image", ("noise_refiner.0.attention.qkv", "context_refiner.0.attention.qkv")),
    ("DiT (diffusers' names)", ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table",)),
)
"""Modules that an architecture has, as far as they tell it from those further down."""


def guessed(tensors: Iterable[str]) -> str | None:
    """The architecture that names of tensors look like, and whose names they are; None for none that is known."""
    modules = set()
    for name in tensors:
        bare = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        modules |= {bare.rpartition(".")[0]}
    return next((title for title, hallmarks in _ARCHITECTURES if modules >= {*hallmarks}), None)
