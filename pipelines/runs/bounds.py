"""Bounds of the numbers that a command is given: what no use needs is refused before anything is allocated for it."""

import math
import os
import re
from typing import Any

from dmquant import kernels
from dmquant.cpu import products
from dmquant.errors import UsageError, check_choice
from dmquant.pipelines.models.registry import FRAMES, ModelSpec, call_parameters, family_for

BOUNDS = {
    "num_prompts": 1_000_000,
    "prompt_seed": 1 << 62,
    "steps": 10_000,
    "guidance": 1_000,
    "height": 16_384,
    "width": 16_384,
    "frames": 10_000,
    "seed": 1 << 62,  # and the number of the image is added to it
    "batch_size": 10_000,
}
"""By option, the largest number that it takes."""
MOST_PIXELS = 1 << 26
PIXELS_A_LATENT = 8  # diffusers asks for sizes that this divides
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]i?)b?", re.IGNORECASE)
_POWERS = "kmgt"


def check_numbers(options: Any) -> None:
    """UsageError for an option of BOUNDS that is beyond it, or no number."""
    for name, most in BOUNDS.items():
        given = getattr(options, name)
        if given is not None and not (math.isfinite(given) and given <= most):
            raise UsageError(f"--{name.replace('_', '-')} {str(given)[:40]} is more than this takes: {most} at most")


def check_image_size(height: int, width: int) -> None:
    """UsageError for a size in pixels that diffusers does not take, or that is larger than any image."""
    for side, pixels in (("height", height), ("width", width)):
        if pixels % PIXELS_A_LATENT:
            raise UsageError(f"--{side} {pixels} is not a multiple of {PIXELS_A_LATENT}")
    if height * width > MOST_PIXELS:
        raise UsageError(f"images of {width}x{height} have more than {MOST_PIXELS // 1_000_000} million pixels")


def check_taken(options: Any, model: ModelSpec) -> None:
    """UsageError for an option that the pipeline's call has no argument for."""
    taken, own = call_parameters(model.pipeline), {"height": model.height, "width": model.width}
    arguments = {"height": "height", "width": "width", "frames": FRAMES}
    arguments["guidance"] = family_for(model).guidance_argument
    for option, argument in arguments.items():
        given = getattr(options, option)
        if given is not None and argument not in taken and given != own.get(option):
            size = f"; {model.name} makes images of {model.width}x{model.height}" if option in own else ""
            raise UsageError(f"--{option} {given}: a {model.pipeline} takes no {option}{size}")


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 8GB, 512MB or 1.5GiB; UsageError, naming the option, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{option} '{text[:40]}' is not a size: write it as 8GB, 512MB or 1.5GiB")
    prefix = match[2].lower()
    return int(float(match[1]) * (1024 if prefix.endswith("i") else 1000) ** (_POWERS.index(prefix[0]) + 1))


def check_environment() -> None:
    """Raises UsageError for a word that kernels do not know in a variable that layers read after calibration."""
    if kernel := os.environ.get(kernels.VARIABLE):
        check_choice("kernel", kernel, kernels.names())
    kernels.weights_kept()
    products.allowed()
