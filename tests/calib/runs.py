"""Calibrations small enough for tests: tiny pipelines, a few prompts, a few steps."""

import contextlib
import copy
from pathlib import Path

import torch

from dmquant.calib.capture import capture
from dmquant.calib.engine import calibrate_
from dmquant.calib.sampling import Sampling
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.recipe import Recipe
from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart, tiny_sd, tiny_sdxl

PROMPTS = ["a red cat", "a blue boat", "a tree", "a face"]
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 4, "guidance_scale": 3.0}
KEEP = {
    "match": ["pos_embed*", "adaln_single*", "caption_projection*", "proj_out", "conv_in", "conv_out", "*time_emb*"]
}
PIXART_BLOCKS = ("transformer_blocks",)
UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
FAMILIES = {
    "pixart": (lambda: tiny_pixart(blocks=3), "transformer", PIXART_BLOCKS, PIXART_CALL),
    "sd": (tiny_sd, "unet", UNET_BLOCKS, {}),
    "sdxl": (tiny_sdxl, "unet", UNET_BLOCKS, {}),
}


def captured(family: str, folder: Path):
    """Backbone, its block paths, and calibration data: 12 samples to learn from and 4 held out."""
    build, component, blocks, options = FAMILIES[family]
    pipeline = build()
    backbone = getattr(pipeline, component)
    with torch.no_grad():  # diffusers starts some with zeros, such as the gates of PixArt's blocks
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    store = capture(
        pipeline,
        component,
        PROMPTS,
        sampling=Sampling("stratified", 4, 0.25, 0),
        call=SIZE | options,
        seed=0,
        batch_size=4,
        folder=folder,
        made_for={"family": family},
    )
    return backbone, blocks, store


def recipe_of(rules=(), keep=True, learning=None, **settings) -> Recipe:
    """Adaround on FP4 weights in groups of 16, a few steps; `keep` leaves the layers outside of blocks alone."""
    kept = [KEEP | {"keep": True}] if keep else []
    return Recipe.model_validate(
        {
            "name": "test",
            "granularity": "group:16",
            "rounding": {"method": "adaround", "regularizer": 10.0},
            "learning": {"iterations": 12, "batch_size": 4, "checks": 2} | (learning or {}),
            "rules": [*kept, *rules],
        }
        | settings
    )


@contextlib.contextmanager
def no_bar(title):
    yield lambda *args: None


def calibrated(case, recipe: Recipe, folder: Path, **options):
    """The backbone of `case`, copied and calibrated; and what the calibration told."""
    backbone, blocks, store = case
    backbone = copy.deepcopy(backbone)
    settings = {"blocks": blocks, "folder": folder, "made_for": {"weights": "w"}, "bar": no_bar}
    return backbone, calibrate_(backbone, recipe, store, **settings | options)


def quantized_layers(backbone) -> dict[str, QuantLinear | QuantConv2d]:
    return {name: layer for name, layer in backbone.named_modules() if isinstance(layer, (QuantLinear, QuantConv2d))}


def packed(backbone) -> dict[str, torch.Tensor]:
    """Codes and scales of every quantized layer."""
    return {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in quantized_layers(backbone).items()
        for part in ("qweight", "scale", "scale_base", "input_scale")
        if getattr(layer, part) is not None
    }


def is_same(one, other) -> bool:
    """Whether two backbones have the same codes and scales."""
    first, second = packed(one), packed(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
