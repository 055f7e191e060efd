"""Tiny pipelines that take images: made of those in TINY, with a ControlNet of their backbone where they take one."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from dmquant.diffusers.families import families
from dmquant.diffusers.imaged import argument_for, with_parts_of
from dmquant.pipelines.models.registry import call_parameters
from tests.tiny import IMAGE_SIZE, TINY, Tiny, tiny_sd3
from tests.tiny.edits import FLUX_CALL, few_pixels, tiny_kontext, tiny_qwenimage_edit, tiny_qwenimage_edit_plus
from tests.tiny.parts import finished

SANA_SETTINGS = (
    *("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads"),
    *("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "sample_size"),
)
HUNYUAN_SETTINGS = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size", "hidden_size"),
    *("mlp_ratio", "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim", "text_len", "text_len_t5"),
    "use_style_cond_and_image_meta_size",
)
CONTROLNETS = {
    "UNet2DConditionModel": lambda unet: diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8)
    ),
    "HunyuanDiT2DModel": lambda backbone: diffusers.HunyuanDiT2DControlNetModel(
        **{name: backbone.config[name] for name in HUNYUAN_SETTINGS}, transformer_num_layers=backbone.config.num_layers
    ),
    "FluxTransformer2DModel": lambda backbone: diffusers.FluxControlNetModel.from_transformer(
        backbone, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ),
    "QwenImageTransformer2DModel": lambda backbone: diffusers.QwenImageControlNetModel.from_transformer(
        backbone, num_layers=1, attention_head_dim=16, num_attention_heads=2, extra_condition_channels=0
    ),
    "SanaTransformer2DModel": lambda backbone: diffusers.SanaControlNetModel(
        **{name: backbone.config[name] for name in SANA_SETTINGS}, num_layers=1
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


def images(pipeline: str, given: tuple[str, ...], size: int, count: int) -> dict[str, Any]:
    """Images of the kinds `given` for `count` prompts, by argument of the call of a pipeline."""
    parameters = call_parameters(pipeline)
    return {
        argument_for(kind, parameters): masks(count, size) if kind == "mask" else pictures(count, size, seed)
        for seed, kind in enumerate(given)
    }


def tiny_imaged(model: str, given: tuple[str, ...]) -> Tiny:
    """The pipeline that takes the kinds of images `given` and has the parts of a tiny model."""
    tiny, family = TINY[model], families()[TINY[model].family]
    name = family.imaged[BASES[model]][given]
    taken = call_parameters(name)

    def build(folder: Path | None = None) -> Any:
        pipeline = WIDER.get((model, given), tiny.build)()
        more = {"controlnet": controlnet(getattr(pipeline, family.component))} if "control" in given else {}
        return finished(with_parts_of(pipeline, getattr(diffusers, name), **more), folder)

    return replace(
        tiny,
        build=build,
        call={argument: value for argument, value in tiny.call.items() if argument in taken},
        images=partial(images, name, given, tiny.size),
        takes_size="height" in taken,
        recent=True,
    )


def edit(build: Any, name: str, family: str, call: dict[str, Any], **more: Any) -> Tiny:
    """A tiny pipeline that edits images."""
    return Tiny(build, family, call, images=partial(images, name, ("image",), IMAGE_SIZE), recent=True, **more)


WIDER = {("sd3", ("image", "mask")): partial(tiny_sd3, channels=16)}
"""How a pipeline is built whose other kind insists on a number of channels."""
BASES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sana": "SanaPipeline",
    "hunyuan-1.2": "HunyuanDiTPipeline",
    "flux": "FluxPipeline",
    "chroma": "ChromaPipeline",
    "qwenimage": "QwenImagePipeline",
}
QWEN_CALL = {"negative_prompt": " "}
IMAGED = {
    f"{model} {'+'.join(given)}": tiny_imaged(model, given)
    for model, base in BASES.items()
    for given in families()[TINY[model].family].imaged[base]
} | {
    "flux-kontext": edit(tiny_kontext, "FluxKontextPipeline", "flux", TINY["flux"].call | FLUX_CALL),
    "qwenimage-edit": edit(
        tiny_qwenimage_edit, "QwenImageEditPipeline", "qwenimage", QWEN_CALL, within=few_pixels, most=1
    ),
    "qwenimage-edit-plus": edit(
        tiny_qwenimage_edit_plus, "QwenImageEditPlusPipeline", "qwenimage", QWEN_CALL, within=few_pixels, most=1
    ),
    "qwenimage-edit-2511": edit(
        partial(tiny_qwenimage_edit_plus, zero_cond_t=True),
        "QwenImageEditPlusPipeline",
        "qwenimage",
        QWEN_CALL,
        within=few_pixels,
        most=1,
    ),
}
"""Every pipeline that takes images beside a prompt, by the model whose parts it has and the images."""
