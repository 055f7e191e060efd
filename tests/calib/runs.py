"""Calibrations small enough for tests: tiny pipelines, a few prompts, a few steps."""

import contextlib
import copy
import gc
from pathlib import Path

import pytest
import torch

from dmquant.calib.blocks.engine import calibrate_
from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import families
from dmquant.diffusers.quantizer import mark_quantized
from dmquant.diffusers.saving import save_pipeline
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.pipelines.models.loading import load_pipeline
from dmquant.recipe import Recipe
from tests.tiny import TINY
from tests.tiny.imaged import IMAGED

PROMPTS = 4
STEPS = 4
gc.freeze()  # calibration collects garbage after every block; what the imports made need not be looked at again
KEEP = {"match": list(families()["pixart"].keep), "keep": True}
# Of a tiny UNet: a way down, both resnets that join inputs, an attention of the way up, and layers outside of blocks.
PART_OF_UNET = [
    {"match": "*", "keep": True},
    {"match": ["down_blocks.0.*", "up_blocks.1.resnets.*", "up_blocks.1.attentions.1.*"], "keep": False},
    {"match": ["conv_out", "time_embedding.linear_1"], "keep": False},
]


def call_of(model: str, steps: int) -> dict:
    """Arguments of the pipeline's call for a tiny model."""
    tiny = (TINY | IMAGED)[model]
    size = {"height": tiny.size, "width": tiny.size} if tiny.takes_size else {}
    size["num_inference_steps"] = steps
    guidance = {families()[tiny.family].guidance_argument: 3.0} if tiny.takes_guidance else {}
    return size | guidance | dict(tiny.call)


def captured(model: str, folder: Path, **sizes):
    """Backbone of a tiny pipeline, names of its blocks, and calibration data: 12 samples to learn from, 4 held out."""
    tiny = (TINY | IMAGED)[model]
    family, pipeline = families()[tiny.family], tiny.build(**sizes)
    backbone = getattr(pipeline, family.component)
    with torch.no_grad():  # diffusers starts some with zeros, such as the gates of PixArt's blocks
        for parameter in backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    with tiny.within():
        store = capture(
            family.prompted(pipeline),
            family.component,
            Calls(tiny.prompts[:PROMPTS], 0, call_of(model, STEPS) | tiny.images(PROMPTS)),
            sampling=Sampling("stratified", 4, 0.25, 0),
            batch_size=tiny.most,
            folder=folder,
            made_for={"model": model},
            **family.batching,
        )
    return backbone, family.blocks(backbone), store


def without_padding(family, arguments, rows=slice(None)):
    """Arguments of a backbone by name, without those that are None, in some rows: padded texts without their padding,
    lists to their entries."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    changed = {name: arguments[name][rows] for name in family.listed}
    for name, mask in family.padded.items():
        text, kept = arguments[name][rows], arguments.get(mask)
        changed |= {name: text.flatten(0, 1) if kept is None else text[kept[rows].bool()], mask: None}
    return arguments | changed


def recipe_of(rules=(), keep=True, learning=None, **settings) -> Recipe:
    """Adaround on FP4 weights in groups of 16, a few steps; `keep` leaves the layers around PixArt's blocks alone."""
    kept = [KEEP] if keep else []
    return Recipe.model_validate(
        {
            "name": "test",
            "keep": "none",
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


def stopped_and_resumed(case, recipe: Recipe, folder: Path):
    """What `calibrated` gives where it was stopped after the first block and called again."""

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(case, recipe, folder, say=stop)
    told = []
    result = calibrated(case, recipe, folder, say=told.append)
    assert ["already there" in line for line in told] == [True, *[False] * (len(told) - 1)]
    assert len(told) > 1
    return result


def has_same_state(one, other) -> bool:
    """Whether two backbones have the same tensors, quantized or not."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def quantized_layers(backbone) -> dict[str, QuantLinear | QuantConv2d]:
    return {name: layer for name, layer in backbone.named_modules() if isinstance(layer, (QuantLinear, QuantConv2d))}


def saved_and_loaded(model: str, backbone, recipe: Recipe, folder: Path):
    """The backbone of the tiny pipeline that was saved with `backbone`, quantized by `recipe`, and loaded back."""
    tiny = TINY[model]
    pipeline, component = tiny.build(), families()[tiny.family].component
    setattr(pipeline, component, backbone)
    mark_quantized(backbone, recipe)
    save_pipeline(pipeline, folder)
    return getattr(load_pipeline(folder), component)


def packed(backbone) -> dict[str, torch.Tensor]:
    """Codes and scales of every quantized layer."""
    return {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in quantized_layers(backbone).items()
        for part in ("qweight", "scale", "scale_base", "input_scale", *layer.part_names)
        if getattr(layer, part) is not None
    }


def is_same(one, other) -> bool:
    """Whether two backbones have the same codes and scales."""
    first, second = packed(one), packed(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
