"""Tiny pipelines that change an image: Qwen-Image-Edit, its successor Plus, and Flux.1 Kontext."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from dmquant.diffusers.imaged import with_parts_of
from tests.tiny.flux import tiny_flux
from tests.tiny.parts import IMAGE_TOKEN, finished, qwen_vl, tokenizer
from tests.tiny.qwenimage import tiny_qwenimage

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
PIXELS = 32 * 32
FLUX_CALL: Mapping[str, Any] = {"max_area": PIXELS, "_auto_resize": False}
"""What keeps a tiny Kontext from making images of a million pixels."""


def tiny_qwenimage_edit(
    folder: Path | None = None, *, kind: type = QwenImageEditPipeline, seed: int = 0, **transformer: Any
) -> Any:
    """QwenImageEditPipeline, or of another kind, whose text encoder sees the image as well."""
    base = tiny_qwenimage(seed=seed, **transformer)
    words = tokenizer(bos=False)
    words.add_special_tokens({"additional_special_tokens": [*VISION_TOKENS, IMAGE_TOKEN]})
    words.model_max_length = 1024
    torch.manual_seed(seed)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor())
    pipeline = with_parts_of(base, kind, text_encoder=qwen_vl(words), tokenizer=words, processor=processor)
    return finished(pipeline, folder)


def tiny_qwenimage_edit_plus(folder: Path | None = None, *, seed: int = 0, **transformer: Any) -> Any:
    """QwenImageEditPlusPipeline."""
    return tiny_qwenimage_edit(folder, kind=QwenImageEditPlusPipeline, seed=seed, **transformer)


def tiny_kontext(folder: Path | None = None, *, seed: int = 0) -> FluxKontextPipeline:
    """FluxKontextPipeline: the image stands behind the noisy one, in one sequence."""
    return finished(with_parts_of(tiny_flux(seed=seed), FluxKontextPipeline), folder)


@contextlib.contextmanager
def few_pixels() -> Iterator[None]:
    """Until the block ends, the editing pipelines of Qwen-Image see images of PIXELS, not of a million."""
    dimensions = pipeline_qwenimage_edit.calculate_dimensions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: dimensions(min(area, PIXELS), ratio)
        )
        for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"):
            patch.setattr(pipeline_qwenimage_edit_plus, name, PIXELS)
        yield
