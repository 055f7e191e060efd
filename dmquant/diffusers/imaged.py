"""Pipelines that take images beside a prompt, made of the parts of one that takes a prompt alone."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ARGUMENTS = {"image": ("image",), "mask": ("mask_image",), "control": ("control_image", "image")}
"""Arguments of a pipeline's call that take a kind of image: the first of them that a pipeline has does."""


def argument_for(kind: str, parameters: Mapping[str, Any]) -> str:
    """The argument for a kind of image in ARGUMENTS, of the pipeline with a call of these `parameters`."""
    return next(name for name in ARGUMENTS[kind] if name in parameters)


def with_parts_of(pipeline: "DiffusionPipeline", kind: "type[DiffusionPipeline]", **more: Any) -> "DiffusionPipeline":
    """A pipeline of another kind with the parts of `pipeline`, and `more`, in the memory and dtypes that they are in.

    `from_pipe` of diffusers casts all parts to float32, and `AutoPipeline` knows few of the kinds.
    """
    known = {**pipeline.config, **pipeline.components, **more}
    parameters = inspect.signature(kind.__init__).parameters
    other = kind(**{name: known[name] for name in parameters if name in known})
    other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return other
