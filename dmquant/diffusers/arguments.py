"""The arguments of a pipeline's call, as one gives them for one prompt, for calls with many prompts."""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmquant.diffusers.calling import call_pipeline
from dmquant.errors import UsageError

EMBEDDED = "prompt_embeds"  # in the place of prompts
TEXTS = frozenset({"prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"})
PICTURES = frozenset({"image", "mask_image", "control_image"})
"""Images that the call takes beside a prompt: to change, where to change it, to follow."""
TOGETHER = TEXTS | {
    *("height", "width", "num_inference_steps", "timesteps", "sigmas", "denoising_end", "eta", "clip_skip"),
    *("num_frames", "guidance_scale", "guidance_scale_2", "guidance_rescale", "true_cfg_scale"),
    *("strength", "controlnet_conditioning_scale", *PICTURES),
    *("max_sequence_length", "clean_caption", "use_resolution_binning", "complex_human_instruction"),
}
"""Arguments that mean the same for several prompts as for one. SDXL's negative sizes do not: diffusers 0.42 gives those
of a batch to the wrong rows."""
IMAGES, LATENTS = "num_images_per_prompt", "latents"
PLAIN = (type(None), bool, int, float, str)


@runtime_checkable
class Picture(Protocol):
    """An image that is in memory only while it is needed."""

    sha256: str
    """Hash of its pixels."""

    def opened(self) -> Any:
        """The image, for Pillow."""


@dataclass(frozen=True)
class Calls:
    """Calls of a pipeline that differ in their prompts, and the images that go with these.

    Raises UsageError for an argument with entries for neither one prompt nor all of them.
    """

    prompts: Sequence[str] | None
    """None where the arguments have their embeddings."""
    seed: int
    """Image i of all starts from the noise of `seed` + i."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Those of the pipeline's call for one prompt, other than prompt, generator and output type. A list of texts,
    embeddings, latents or images may also have entries for every prompt."""

    def __post_init__(self) -> None:
        if not isinstance(self.images, int) or self.images < 1:
            raise UsageError(f"'{IMAGES}' is {self.images!r}: give a whole number from 1")
        for name, value in self.arguments.items():
            count, entries = self._entries(name), _length(value)
            if count is not None and entries is not None and entries not in (count, count * len(self)):
                raise UsageError(
                    f"'{name}' has {entries} entries: give {count}, the same for every prompt, or {count * len(self)}, "
                    f"for the {len(self)} prompts to calibrate with"
                )

    def __len__(self) -> int:
        return len(self.arguments[EMBEDDED] if self.prompts is None else self.prompts)

    @property
    def images(self) -> int:
        """Images of one prompt."""
        given = self.arguments.get(IMAGES)
        return 1 if given is None else given

    @property
    def one_by_one(self) -> bool:
        """Whether each call is for one prompt, as its arguments may mean something else for several at once."""
        given = {name for name, value in self.arguments.items() if value is not None}
        others = {name: value for name, value in self.arguments.items() if name not in PICTURES}
        pictures = [self.arguments[name] for name in PICTURES & given]
        return not given <= TOGETHER or not _is_plain(others) or not all(map(_are_plain_pictures, pictures))

    def only(self, indices: Sequence[int]) -> "Calls":
        """The calls with some of the prompts, numbered anew."""
        prompts = None if self.prompts is None else [self.prompts[index] for index in indices]
        return replace(self, prompts=prompts, arguments={**self.arguments, **self._with_entries(indices)})

    def encoded(self, embeddings: Mapping[str, Any]) -> "Calls":
        """The calls with embeddings, an entry for every prompt, in the place of prompts and other texts."""
        others = {name: value for name, value in self.arguments.items() if name not in TEXTS}
        return replace(self, prompts=None, arguments={**others, **embeddings})

    def latents(self, pipeline: Any, batch: range, differentiable: bool = False) -> Tensor:
        """Latents (images, channels, height, width) at the end of a call with a batch of the prompts."""
        return self.made(pipeline, batch, "latent", differentiable)

    def made(self, pipeline: Any, batch: range, output_type: str, differentiable: bool = False) -> Any:
        """What a call with a batch of the prompts makes, by the pipeline's name of that: `latent`, `pil`."""
        count = len(batch)
        cut = self._with_entries(batch)
        arguments = {name: _copied(value) for name, value in self.arguments.items() if name not in cut} | cut
        for name in TEXTS & arguments.keys():
            text = arguments[name]
            each = [text] if isinstance(text, str) else text
            arguments[name] = each if each is None or len(each) == count else list(each) * count
        for name in PICTURES & arguments.keys():
            arguments[name] = None if arguments[name] is None else _for_batch(arguments[name], count)
        seeds = [self.seed + image for image in range(batch.start * self.images, batch.stop * self.images)]
        prompts = None if self.prompts is None else self.prompts[batch.start : batch.stop]
        return call_pipeline(pipeline, prompts, seeds, output_type, arguments, differentiable)

    def described(self) -> dict[str, Any]:
        """The arguments as JSON can hold them: equal where they are, and never for those whose content is not known."""
        return {name: _described(value) for name, value in self.arguments.items()}

    def dependencies(self) -> dict[str, Any]:
        """All that the calls depend on but the pipeline, as JSON can hold it."""
        prompts = None if self.prompts is None else hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        return {"prompts": prompts, "number of prompts": len(self), **self.described(), "seed": self.seed}

    def _with_entries(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments that have entries for every prompt, with those of some."""
        cut = {}
        for name, value in self.arguments.items():
            count, entries = self._entries(name), _length(value)
            if count is not None and entries == count * len(self) != count:
                rows = [index * count + image for index in indices for image in range(count)]
                cut[name] = value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
        return cut

    def _entries(self, name: str) -> int | None:
        """Entries of an argument for one prompt; None for one that has none."""
        if name == LATENTS:
            return self.images
        if name in PICTURES:
            value = self.arguments[name]
            is_batch = isinstance(value, Tensor) and value.dim() == 4 and len(value) == len(self)
            return 1 if is_batch or isinstance(value, list | tuple) else None
        is_of_prompt = name in TEXTS or "prompt_embeds" in name or "prompt_attention_mask" in name
        return 1 if is_of_prompt else None


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim()) else None


def _for_batch(value: Any, count: int) -> Any:
    """Images as a call for `count` prompts takes them: one for each in a list, and that of a single prompt as it is,
    since pipelines that edit images do not resize those in a list."""
    each = list(value) if isinstance(value, list | tuple) else [value]
    if count == 1:
        return opened(each[0])
    return opened(each if len(each) == count else each * count)


def opened(value: Any) -> Any:
    """`value` with the images of its files in the place of every Picture."""
    if isinstance(value, list | tuple):
        return [opened(each) for each in value]
    return value.opened() if isinstance(value, Picture) else value


def _are_plain_pictures(value: Any) -> bool:
    """Whether that is an image for Pillow, or a list of some: of those a call takes one for each of its prompts."""
    each = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, Picture) or (hasattr(one, "mode") and hasattr(one, "tobytes")) for one in each)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN)


def _copied(value: Any) -> Any:
    """`value` with copies of its tensors: every call is given what the first one was."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _described(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, Picture):
        return value.sha256
    if hasattr(value, "tobytes"):  # NumPy and Pillow
        about = [str(getattr(value, name, None)) for name in ("dtype", "shape", "mode", "size")]
        return f"{about} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return f"{type(value).__name__} {uuid.uuid4().hex}"
