"""Model families: what dmquant knows of the backbones of one architecture, each in one module of this package.

To add one, write a module that defines `FAMILY`, and a YAML file in configs/models that names it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dmquant.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

HOW_TO_ADD = 'docs/models.md, "Adding a family", says how one is added'


def blocks_in(*lists: str) -> "Callable[[nn.Module], list[str]]":
    """Names of all modules in the backbone's module lists of these names, one list after another."""
    return lambda backbone: [f"{name}.{index}" for name in lists for index in range(len(backbone.get_submodule(name)))]


def first_of_each_patch(features: int, channels: int, first: int) -> "Tensor":
    """Which of a patch projection's output features are of the first `first` channels of a pixel; bool, (features,).

    A diffusion transformer's features are the pixels of a patch, each with its `channels` channels together.
    """
    import torch

    return torch.arange(features) % channels < first


def _nothing(backbone: "nn.Module") -> dict[str, Any]:
    return {}


def _itself(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    return pipeline


@dataclass(frozen=True)
class Family:
    """What is common to the backbones of one architecture."""

    name: str
    component: str
    """Attribute of the pipeline that is the backbone: `transformer` or `unet`."""
    backbones: tuple[str, ...]
    """Class names of the backbones."""
    pipelines: tuple[str, ...]
    """Class names of the pipelines that dmquant can run from a prompt alone."""
    keep: Mapping[str, str]
    """Globs of layer names inside the backbone that stay in high precision by default, and why."""
    blocks: "Callable[[nn.Module], list[str]]"
    """Names of the backbone's modules that are reconstructed one after another. No two hold the same layer."""
    guidance: Literal["rows", "embedded"] = "rows"
    """How classifier-free guidance is computed: with and without the prompt as `rows` of one call, or `embedded` as an
    input of a distilled backbone, which is then called with one row an image."""
    concatenations: "Callable[[nn.Module], dict[str, int]]" = _nothing
    """Layers whose input is the concatenation of a stream and a skip connection, with the channels of the stream. The
    two halves differ in distribution, so each gets scales of its own."""
    counted: "Callable[[nn.Module], dict[str, Tensor]]" = _nothing
    """Layers some of whose output channels the sampler drops (a learned variance): bool, True where one counts."""
    shared: tuple[str, ...] = ()
    """Arguments of the backbone's forward that all rows of a call share, so that they have no batch dimension."""
    prompted: "Callable[[DiffusionPipeline], Any]" = _itself
    """The pipeline as something that is called with prompts; itself, unless its call takes something else."""
    without: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's constructor that leave parts of it out, used where it has such a parameter."""


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """The family of a loaded pipeline's backbone; UserError, naming those that are known, if it has none."""
    for family in families().values():
        if type(getattr(pipeline, family.component, None)).__name__ in family.backbones:
            return family
    backbones = {type(getattr(pipeline, name)).__name__ for name in ("transformer", "unet") if hasattr(pipeline, name)}
    known = ", ".join(name for family in families().values() for name in family.backbones)
    found = " and ".join(sorted(backbones)) or "no backbone"
    raise UserError(
        f"{type(pipeline).__name__} has {found}, which no model family knows; known are {known}; {HOW_TO_ADD}"
    )
