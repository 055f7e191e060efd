"""DiT, trained on ImageNet's 1,000 classes: one list of transformer blocks between patch embedding and projection.

Between the blocks flow the image tokens alone. Every block has an embedder of its own for timestep and class (copies of
one, as published) and makes scales, shifts and gates of it in `norm1.linear`. The latter are a third of all weights, so
they are not kept: their error stays within the block, and learned rounding of the block makes up for it. The output
layer is modulated by the embedder of the first block.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmquant.diffusers.families import Family, blocks_in, first_of_each_patch
from dmquant.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DiTPipeline
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from torch import Tensor, nn


class PromptedDiT:
    """A DiTPipeline that is called like a text-to-image pipeline; everything else is the pipeline's own."""

    def __init__(self, pipeline: "DiTPipeline") -> None:
        self.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: "torch.Generator | list[torch.Generator] | None" = None,
        output_type: str = "pil",
    ) -> "ImagePipelineOutput":
        """Images of the classes that the prompts name or number, or with `output_type="latent"` their final latents.

        Raises UserError for a prompt that is no class and for a size other than the model's.
        """
        from dmquant.diffusers.watching import recording_latents

        self._check_size(height, width)
        classes = [self._class_of(each) for each in ([prompt] if isinstance(prompt, str) else prompt)]
        wants_latents = output_type == "latent"
        with recording_latents(self.pipeline) as latents:
            output = self.pipeline(
                class_labels=classes,
                guidance_scale=guidance_scale,
                generator=generator,
                num_inference_steps=num_inference_steps,
                output_type="pt" if wants_latents else output_type,
            )
        if wants_latents:
            output.images = latents[0]
        return output

    def _class_of(self, prompt: str) -> int:
        """Number of the class; the pipeline's labels hold its names, one or several for each class."""
        number = int(prompt) if prompt.isdecimal() else self.pipeline.labels.get(prompt)
        classes = self.pipeline.transformer.config.num_embeds_ada_norm
        if number is None or number >= classes:
            known = f"one of {len(self.pipeline.labels)} names" if self.pipeline.labels else "without names here"
            raise UserError(f"'{prompt}' is no class of this model: a prompt is a number below {classes}, or {known}")
        return number

    def _check_size(self, height: int | None, width: int | None) -> None:
        pipeline = self.pipeline
        side = pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        if (height or side, width or side) != (side, side):
            raise UserError(f"this DiT makes images of {side}x{side} only, not {width or side}x{height or side}")


def _counted(transformer: "nn.Module") -> "dict[str, Tensor]":
    features = transformer.proj_out_2.out_features
    return {"proj_out_2": first_of_each_patch(features, transformer.out_channels, transformer.config.in_channels)}


FAMILY = Family(
    name="dit",
    component="transformer",
    backbones=("DiTTransformer2DModel",),
    pipelines=("DiTPipeline",),
    keep={
        "pos_embed.*": "sees the noisy latents themselves; 18 thousand of DiT-XL's 675 million weights",
        "*.norm1.emb.*": "embeds the timestep, whose neighbours differ little; 28 copies of one, 6 % of the weights",
        "proj_out_1": "scales and shifts all tokens just before they become noise",
        "proj_out_2": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    counted=_counted,
    prompted=PromptedDiT,
    prompt_first=True,
)
