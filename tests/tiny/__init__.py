"""Tiny untrained diffusers pipelines, built offline: every class is the real one, only the widths are small.

Each builder returns the pipeline in float32 with weights drawn from `seed`, and saves it when given a folder.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

from tests.tiny.auraflow import tiny_auraflow
from tests.tiny.chroma import tiny_chroma
from tests.tiny.cogview4 import tiny_cogview4
from tests.tiny.dit import tiny_dit
from tests.tiny.flux import tiny_flux
from tests.tiny.flux2 import LENGTH as FLUX2_TOKENS
from tests.tiny.flux2 import tiny_flux2, tiny_flux2_klein
from tests.tiny.hunyuan import tiny_hunyuan, tiny_hunyuan_11
from tests.tiny.hunyuanimage import tiny_hunyuanimage
from tests.tiny.parts import TOKENS, WORDS
from tests.tiny.pixart import tiny_pixart, tiny_pixart_alpha, tiny_pixart_alpha_1024
from tests.tiny.qwenimage import tiny_qwenimage
from tests.tiny.sana import tiny_sana
from tests.tiny.stable_diffusion import tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny.wan import tiny_wan, tiny_wan_5b, tiny_wan_22

IMAGE_SIZE = 32
FRAMES = 5  # of a tiny video
LENGTH = {"max_sequence_length": TOKENS}
# What a tiny PixArt pipeline needs in its call besides prompt, size, steps and guidance.
PIXART_CALL = {**LENGTH, "clean_caption": False, "use_resolution_binning": False}
COGVIEW4_PROMPTS = ("red apple", "blue cat", "a green house", "a boat on the tree", "a red cat and a boat " * 4)


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline of one model: how it is built, its family, and what its call needs besides a prompt."""

    build: Callable[..., Any]
    family: str
    call: Mapping[str, Any] = field(default_factory=dict)
    size: int = IMAGE_SIZE
    takes_size: bool = True
    """Whether the call takes height and width."""
    most: int = 4
    """Prompts that a call takes."""
    takes_guidance: bool = True
    """Whether the call takes a scale of guidance."""
    images: Callable[[int], Mapping[str, Any]] = lambda count: {}
    """Images for so many prompts, by argument of the call."""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What the pipeline is called within."""
    recent: bool = False
    """Of a family whose tests but the shortest run among the slow ones: `marked`."""
    prompts: tuple[str, ...] = ("red apple", "blue cat", "a green house", "a boat on the tree", "face")


TINY = {
    "pixart-alpha-512": Tiny(tiny_pixart_alpha, "pixart", PIXART_CALL),
    "pixart-alpha-1024": Tiny(tiny_pixart_alpha_1024, "pixart", PIXART_CALL),
    "pixart-sigma": Tiny(lambda folder=None, blocks=3: tiny_pixart(folder, blocks=blocks), "pixart", PIXART_CALL),
    "sd15": Tiny(tiny_sd, "unet"),
    "sdxl": Tiny(tiny_sdxl, "unet"),
    "hunyuan-1.1": Tiny(tiny_hunyuan_11, "hunyuan", {"use_resolution_binning": False}, size=64),
    "hunyuan-1.2": Tiny(tiny_hunyuan, "hunyuan", {"use_resolution_binning": False}, size=64),
    "sd3": Tiny(tiny_sd3, "sd3", LENGTH),
    "flux": Tiny(tiny_flux, "flux", LENGTH),
    "sana": Tiny(tiny_sana, "sana", PIXART_CALL | {"complex_human_instruction": None}),
    "dit": Tiny(tiny_dit, "dit", prompts=("fish", "1", "boat", "7", "tench")),
    "flux2": Tiny(tiny_flux2, "flux2", {"max_sequence_length": FLUX2_TOKENS}, recent=True),
    "flux2-klein": Tiny(tiny_flux2_klein, "flux2", LENGTH, recent=True),
    "chroma": Tiny(tiny_chroma, "chroma", LENGTH, recent=True),
    "hunyuanimage": Tiny(tiny_hunyuanimage, "hunyuanimage", takes_guidance=False, recent=True),
    "qwenimage": Tiny(tiny_qwenimage, "qwenimage", {"negative_prompt": " "}, recent=True),
    "cogview4": Tiny(tiny_cogview4, "cogview4", {"max_sequence_length": 48}, recent=True, prompts=COGVIEW4_PROMPTS),
    "auraflow": Tiny(tiny_auraflow, "auraflow", LENGTH, recent=True),
    "wan": Tiny(tiny_wan, "wan", {**LENGTH, "num_frames": FRAMES}, recent=True),
    "wan-5b": Tiny(tiny_wan_5b, "wan", {**LENGTH, "num_frames": FRAMES}, recent=True),
    "wan-22": Tiny(tiny_wan_22, "wan", {**LENGTH, "num_frames": FRAMES}, recent=True),
}
"""Every pipeline that dmquant runs, by the name of the model it stands for."""


def marked(names: Iterable[str] = TINY) -> list[Any]:
    """Names as parameters of tests that take long: those of recent families run among the slow tests."""
    early = {name for name, tiny in TINY.items() if not tiny.recent}
    return [name if name.partition(",")[0] in early else pytest.param(name, marks=pytest.mark.slow) for name in names]


__all__ = [
    "FLUX2_TOKENS",
    "FRAMES",
    "IMAGE_SIZE",
    "PIXART_CALL",
    "TINY",
    "TOKENS",
    "WORDS",
    "Tiny",
    "marked",
    "tiny_auraflow",
    "tiny_chroma",
    "tiny_cogview4",
    "tiny_dit",
    "tiny_flux",
    "tiny_flux2",
    "tiny_flux2_klein",
    "tiny_hunyuan",
    "tiny_hunyuan_11",
    "tiny_hunyuanimage",
    "tiny_pixart",
    "tiny_pixart_alpha",
    "tiny_pixart_alpha_1024",
    "tiny_qwenimage",
    "tiny_sana",
    "tiny_sd",
    "tiny_sd3",
    "tiny_sdxl",
    "tiny_wan",
    "tiny_wan_5b",
    "tiny_wan_22",
]
