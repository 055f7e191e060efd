"""The text encoders of diffusers' pipelines, and the layers of each that stay in high precision by default.

A pipeline takes the output of one block or of a few; an error of the last block before it reaches the backbone as it
is, and the norms of the blocks that follow do not make up for it. What is not run for an image, such as the head over
the vocabulary or a tower for pictures, stays as well.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dmquant.errors import UsageError
from dmquant.models import knows_models
from dmquant.recipe import Known, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

HEAD = {"lm_head": "not run for an image, and often one tensor with the embeddings"}
TOWER = {
    "*visual.*": "reads pictures",
    "*vision_tower.*": "reads pictures",
    "*multi_modal_projector.*": "reads pictures",
}


@dataclass(frozen=True)
class Encoder:
    """Facts common to the text encoders of one `model_type` of transformers."""

    blocks: str
    """End of the name of the list of blocks."""
    read: tuple[int, ...]
    """Indices, from the end where negative, of the blocks whose output a pipeline of diffusers takes."""
    keep: "Mapping[str, str]" = field(default_factory=dict)
    """Globs of other layers that stay in high precision, and why."""

    def known(self, model: "nn.Module") -> Known | None:
        """The meaning of `keep: family` in a recipe for this encoder; None where the blocks are not to be found."""
        from torch import nn

        lists = [
            (name, len(part))
            for name, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and f".{name}".endswith(f".{self.blocks}")
        ]
        lists = [(name, count) for name, count in lists if "vision" not in name and "visual" not in name]
        if not lists:
            return None
        ((_, count),) = lists
        found = {index % count for index in self.read if -count <= index < count}
        if 2 * len(found) > count:  # a small encoder: it would stay whole
            found = {self.read[0] % count}
        # Names before the list differ between versions of transformers: CLIP's lost its `text_model` in 5.0.
        read = {f"*{self.blocks}.{index}.*" for index in found}
        return Known({**dict.fromkeys(sorted(read), "the backbone reads its output"), **self.keep})


T5 = Encoder("encoder.block", (-1,))
DECODER = Encoder("layers", (-1, -2), HEAD)
ENCODERS = {
    "t5": T5,  # PixArt, Stable Diffusion 3, Flux, Chroma
    "mt5": T5,  # HunyuanDiT
    "umt5": T5,  # AuraFlow, Wan
    "clip_text_model": Encoder("encoder.layers", (-1, -2), {"text_projection": "one vector conditions every block"}),
    "bert": Encoder("encoder.layer", (-1,), {"pooler.*": "one vector conditions every block"}),  # HunyuanDiT
    "gemma2": DECODER,  # Sana, Lumina 2
    "gemma3_text": DECODER,
    "llama": Encoder("layers", (-1, -2, -3), HEAD),  # HunyuanVideo
    "glm": DECODER,  # CogView 4
    "qwen3": Encoder("layers", (8, 17, 26, -1, -2), HEAD),  # FLUX.2 klein, Z-Image
    "qwen2_5_vl": Encoder("language_model.layers", (-1, -3), HEAD | TOWER),  # Qwen-Image, HunyuanImage
    "mistral3": Encoder("language_model.layers", (9, 19, 29), HEAD | TOWER),  # FLUX.2 dev
}
"""The encoders that are known, by the `model_type` of their configuration, with pipelines that have them."""


def encoder_of(model: "nn.Module") -> Encoder | None:
    """The entry of ENCODERS for a model of transformers, None where there is none."""
    return ENCODERS.get(getattr(getattr(model, "config", None), "model_type", None) or "")


@knows_models
def _known(model: "nn.Module") -> Known | None:
    found = encoder_of(model)
    return found and found.known(model)


def check_known(model: "nn.Module", recipe: Recipe) -> None:
    """UsageError for a recipe that leaves to the encoder which of its layers to keep, where nothing is known of it."""
    if recipe.keep != "none" and _known(model) is None:
        raise UsageError(
            f"of a {type(model).__name__} it is not known which layers have to stay in high precision: name them in "
            f"rules of a recipe with keep: none; known are {', '.join(ENCODERS)}"
        )
