"""Tiny class-conditional DiT."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.tiny.parts import finished, vae


def tiny_dit(folder: Path | None = None, *, seed: int = 0) -> DiTPipeline:
    """DiTPipeline with two blocks; the pipeline takes class 1000 for none, so there are as many."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    labels = {"0": "tench, fish", "1": "cat", "2": "boat"}
    pipeline = DiTPipeline(transformer, vae(32), DDIMScheduler(clip_sample=False), id2label=labels)
    pipeline.register_to_config(id2label=labels)  # published folders name the classes; diffusers would not save them
    return finished(pipeline, folder)
