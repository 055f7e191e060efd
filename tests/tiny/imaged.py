"""Tiny pipelines that take images: made of those in TINY, with a ControlNet of their backbone where they take one."""

from typing import Any

import diffusers
import torch
from PIL import Image

from dmquant.diffusers.families import families
from dmquant.diffusers.imaged import argument_for, with_parts_of
from dmquant.pipelines.models.registry import call_parameters
from tests.tiny import TINY

CONTROLNETS = {
    "UNet2DConditionModel": lambda unet: diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8)
    ),
    "HunyuanDiT2DModel": lambda backbone: diffusers.HunyuanDiT2DControlNetModel.from_transformer(
        backbone, transformer_num_layers=2
    ),
    "FluxTransformer2DModel": lambda backbone: diffusers.FluxControlNetModel.from_transformer(
        backbone, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ),
    "QwenImageTransformer2DModel": lambda backbone: diffusers.QwenImageControlNetModel.from_transformer(
        backbone, num_layers=1, extra_condition_channels=0
    ),
    "SD3Transformer2DModel": lambda backbone: diffusers.SD3ControlNetModel.from_transformer(
        backbone, num_layers=2, num_extra_conditioning_channels=0
    ),
}
"""A ControlNet for a backbone of a class, half as deep."""


def pictures(count: int, size: int, seed: int = 0) -> list[Image.Image]:
    """Images of random colours, of four squares each."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, (count, 2, 2, 3), generator=draw, dtype=torch.uint8).numpy()
    return [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in drawn]


def masks(count: int, size: int) -> list[Image.Image]:
    """Masks of the left half, a bit wider each time."""
    halves = [Image.new("L", (size, size)) for _ in range(count)]
    for index, mask in enumerate(halves):
        mask.paste(255, (0, 0, size // 2 + 2 * index, size))
    return halves


def controlnet(backbone: Any, seed: int = 0) -> Any:
    """A ControlNet of a tiny backbone whose residuals are not zero, as those of a new one are."""
    torch.manual_seed(seed)
    net = CONTROLNETS[type(backbone).__name__](backbone).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net


def tiny_imaged(model: str, given: tuple[str, ...], count: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a tiny model that takes the kinds of images `given`, and images for `count` prompts, by argument
    of its call."""
    tiny = TINY[model]
    pipeline, family = tiny.build(), families()[tiny.family]
    name = family.imaged[type(pipeline).__name__][given]
    more = {"controlnet": controlnet(getattr(pipeline, family.component))} if "control" in given else {}
    parameters = call_parameters(name)
    images = {
        argument_for(kind, parameters): masks(count, tiny.size) if kind == "mask" else pictures(count, tiny.size, seed)
        for seed, kind in enumerate(given)
    }
    return with_parts_of(pipeline, getattr(diffusers, name), **more), images
